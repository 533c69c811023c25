// What a decoder's step spends its time with, as XLA FFI handlers: x @ (rows * scale).T of int8 or
// bfloat16 rows and a few float32 rows x, and attention of one token of each row to what came before.
//
// Values become numbers of a vector register on their way to a product, at a cost low enough that
// memory is all that a product with one row of activations waits for:
// - bfloat16: of a 32-bit word a shift makes one float, a mask the other.
// - int8, on x86: activations are written as integers of a common step, and those as digits, which
//   are multiplied as integers: bytes with VNNI, with AVX2 alone two bytes at a time.
// - int8 elsewhere, and of several rows without VNNI: bytes are widened and converted.
//
// Sizes: B rows of activations, O outputs, I inputs.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#define HAS_INTEGER_PRODUCTS 1
#else
#define HAS_INTEGER_PRODUCTS 0
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define HAS_BYTE_PRODUCTS 1
#else
#define HAS_BYTE_PRODUCTS 0
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512BW__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif
constexpr int64_t kLanes = kVectorBytes / 4;
// GCC and Clang turn these into the instructions of any machine.
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));

// Bytes that are asked for before they are needed, as a core has too few reads under way on its own.
// In the order of memory, whatever order they are used in, so that its prefetchers see one stream; and
// into the level 2 cache, as those on their way into the first are too few.
constexpr int64_t kAhead = 24 << 10;
constexpr int64_t kLine = 64;
inline void Prefetch(const void* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += kLine)
    __builtin_prefetch(static_cast<const char*>(from) + byte, 0, 2);
}

template <typename Vector>
inline Vector Load(const void* from) {
  Vector loaded;
  std::memcpy(&loaded, from, sizeof(loaded));
  return loaded;
}

inline float Sum(Floats lanes) {
  // By halves: in order, each sum would wait for the one before it.
  float totals[kLanes];
  std::memcpy(totals, &lanes, sizeof(totals));
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) totals[lane] += totals[lane + half];
  return totals[0];
}

inline int64_t WideSum(Words lanes) {
  int64_t total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

// A value for several products: compilers would read it again for each, and a core has as many reads
// of whole vectors as products.
template <typename Vector>
inline Vector LoadOnce(const void* from) {
  Vector loaded = Load<Vector>(from);
#if defined(__AVX512BW__)
  asm("" : "+v"(loaded));
#elif defined(__AVX2__)
  asm("" : "+x"(loaded));
#endif
  return loaded;
}

// Zeros that begin on a cache line: vectors across two of them take twice the time.
template <typename Number>
class Aligned {
 public:
  explicit Aligned(int64_t size) : storage_(size + kLine / sizeof(Number)) {
    void* from = storage_.data();
    std::size_t space = storage_.size() * sizeof(Number);
    begin_ = static_cast<Number*>(std::align(kLine, size * sizeof(Number), from, space));
  }
  Aligned(const Aligned&) = delete;
  Number& operator[](int64_t index) { return begin_[index]; }
  const Number& operator[](int64_t index) const { return begin_[index]; }

 private:
  std::vector<Number> storage_;
  Number* begin_;
};

// How each kind is stored: groups of kLanes * kPlaces values become kPlaces vectors, of which lane l of
// place p holds value Index(p, l).
struct Float32 {
  float stored;
  static constexpr int kPlaces = 2;
  static int64_t Index(int64_t place, int64_t lane) { return place * kLanes + lane; }
  float Value() const { return stored; }
  template <int kPlace>
  static Floats Spread(const Float32* group) {
    return Load<Floats>(group + kPlace * kLanes);
  }
};

struct Int8 {
  int8_t stored;
  static constexpr int kPlaces = 4;
  static int64_t Index(int64_t place, int64_t lane) { return place * kLanes + lane; }
  float Value() const { return stored; }
  template <int kPlace>
  static Floats Spread(const Int8* group) {
    const Int8* from = group + kPlace * kLanes;
#if defined(__AVX512BW__)
    return reinterpret_cast<Floats>(
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Load<__m128i>(from))));
#elif defined(__AVX2__)
    // Compilers make eight scalar conversions of what is meant below.
    return reinterpret_cast<Floats>(
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#else
    typedef int8_t Narrow __attribute__((vector_size(kLanes)));
    return __builtin_convertvector(Load<Narrow>(from), Floats);
#endif
  }
};

struct BFloat16 {
  uint16_t stored;
  static constexpr int kPlaces = 2;
  static int64_t Index(int64_t place, int64_t lane) { return lane * kPlaces + place; }
  float Value() const {
    uint32_t bits = uint32_t{stored} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  template <int kPlace>
  static Floats Spread(const BFloat16* group) {
    Words words = Load<Words>(group);
    return reinterpret_cast<Floats>(kPlace == 0 ? words << 16 : words & ~0xFFFF);
  }
};

// Products of what the last, incomplete group of values holds.
template <typename Stored>
inline float Rest(const Stored* row, const float* x, int64_t from, int64_t inputs) {
  float total = 0;
  for (int64_t i = from; i < inputs; ++i) total += row[i].Value() * x[i];
  return total;
}

// B rows of activations as floats, in the order in which groups give values.
template <typename Stored, int B>
class FloatActivations {
 public:
  static constexpr int64_t kGroup = kLanes * Stored::kPlaces;
  static constexpr int kRows = B == 4 ? 2 : 4;  // as many sums as registers hold

  FloatActivations(const float* x, int64_t inputs)
      : inputs_(inputs), x_(x), reordered_(B * inputs) {
    float* to = &reordered_[0];
    for (int64_t i = 0; i + kGroup <= inputs; i += kGroup)
      for (int64_t place = 0; place < Stored::kPlaces; ++place)
        for (int64_t b = 0; b < B; ++b)
          for (int64_t lane = 0; lane < kLanes; ++lane)
            *to++ = x[b * inputs + i + Stored::Index(place, lane)];
  }

  // out[r][b] of R rows, `stride` apart; what is read and spread once serves all B.
  template <int R>
  void Tile(const Stored* rows, int64_t stride, float (&out)[R][B]) const {
    Floats sums[R][B] = {};
    const Stored* in_order = rows;
    int64_t i = 0;
    for (; i + kGroup <= inputs_; i += kGroup) {
      Prefetch(in_order + kAhead / sizeof(Stored), R * kGroup * sizeof(Stored));
      in_order += R * kGroup;
      Multiply<R, 0>(rows + i, stride, &reordered_[B * i], sums);
    }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        out[r][b] = Sum(sums[r][b]) + Rest(rows + r * stride, x_ + b * inputs_, i, inputs_);
  }

 private:
  template <int R, int kPlace>
  static void Multiply(const Stored* rows, int64_t stride, const float* x, Floats (&sums)[R][B]) {
    Floats weights[R];
    for (int r = 0; r < R; ++r) weights[r] = Stored::template Spread<kPlace>(rows + r * stride);
    for (int b = 0; b < B; ++b) {
      Floats activations = LoadOnce<Floats>(x + b * kLanes);
      for (int r = 0; r < R; ++r) sums[r][b] += weights[r] * activations;
    }
    if constexpr (kPlace + 1 < Stored::kPlaces)
      Multiply<R, kPlace + 1>(rows, stride, x + B * kLanes, sums);
  }

  int64_t inputs_;
  const float* x_;
  Aligned<float> reordered_;
};

#if HAS_INTEGER_PRODUCTS

constexpr int kSums = kVectorBytes == 64 ? 24 : 12;  // that registers hold, beside factors

#if HAS_BYTE_PRODUCTS
// Weights as w + kOffset, as one factor of a product of bytes must have no sign.
using Digit = int8_t;
constexpr int kDigits = 3, kDigitBits = 8, kOffset = 128;
inline Bytes LoadWeights(const Int8* from) { return Load<Bytes>(from) ^ 0x80; }

// sum + the four products of bytes in every word.
inline Words MultiplyDigits(Bytes weights, Bytes digits, Words sum) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Words>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                     reinterpret_cast<__m512i>(weights),
                                                     reinterpret_cast<__m512i>(digits)));
#else
  return reinterpret_cast<Words>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum),
                                                         reinterpret_cast<__m256i>(weights),
                                                         reinterpret_cast<__m256i>(digits)));
#endif
}
#else
using Digit = int16_t;
constexpr int kDigits = 2, kDigitBits = 15, kOffset = 0;

// Weights made twice as wide, and sum + the two products in every word.
#if defined(__AVX512BW__)
inline Bytes LoadWeights(const Int8* from) {
  return reinterpret_cast<Bytes>(_mm512_cvtepi8_epi16(Load<__m256i>(from)));
}
inline Words MultiplyDigits(Bytes weights, Bytes digits, Words sum) {
  return sum + reinterpret_cast<Words>(_mm512_madd_epi16(reinterpret_cast<__m512i>(weights),
                                                         reinterpret_cast<__m512i>(digits)));
}
#else
inline Bytes LoadWeights(const Int8* from) {
  return reinterpret_cast<Bytes>(_mm256_cvtepi8_epi16(Load<__m128i>(from)));
}
inline Words MultiplyDigits(Bytes weights, Bytes digits, Words sum) {
  return sum + reinterpret_cast<Words>(_mm256_madd_epi16(reinterpret_cast<__m256i>(weights),
                                                         reinterpret_cast<__m256i>(digits)));
}
#endif
#endif

// B rows of activations, each as integers of a step of its own: of at most 22 bits with VNNI, so that
// the error is 2^-22 of the greatest value at most, and 28 without.
template <int B>
class DigitActivations {
 public:
  static constexpr int64_t kGroup = kVectorBytes / sizeof(Digit);
  static constexpr int kRows = std::clamp(kSums / (B * kDigits), 1, 4);

  DigitActivations(const float* x, int64_t inputs)
      : inputs_(inputs), x_(x), digits_(B * kDigits * inputs) {
    for (int64_t b = 0; b < B; ++b) Write(b);
  }

  template <int R>
  void Tile(const Int8* rows, int64_t stride, float (&out)[R][B]) const {
    int64_t totals[R][B] = {};
    const Int8* in_order = rows;
    int64_t i = 0;
    while (i + kGroup <= inputs_) {
      int64_t stop = std::min(inputs_, i + kMaxGroups * kGroup);
      Words sums[R][B][kDigits] = {};
      for (; i + kGroup <= stop; i += kGroup) {
        Prefetch(in_order + kAhead, R * kGroup);
        in_order += R * kGroup;
        Bytes weights[R];
        for (int r = 0; r < R; ++r) weights[r] = LoadWeights(rows + r * stride + i);
        const Digit* x = &digits_[B * kDigits * i];
        for (int b = 0; b < B; ++b)
          for (int digit = 0; digit < kDigits; ++digit, x += kGroup) {
            Bytes digits = LoadOnce<Bytes>(x);
            for (int r = 0; r < R; ++r)
              sums[r][b][digit] = MultiplyDigits(weights[r], digits, sums[r][b][digit]);
          }
      }
      for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
          for (int digit = 0; digit < kDigits; ++digit)
            totals[r][b] += WideSum(sums[r][b][digit]) << (kDigitBits * digit);
    }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        out[r][b] = float((totals[r][b] - kOffset * wholes_[b]) * steps_[b]) +
                    Rest(rows + r * stride, x_ + b * inputs_, i, inputs_);
  }

 private:
  // After as many a lane's sum might not fit into 32 bits.
  static constexpr int64_t kMaxGroups = std::numeric_limits<int32_t>::max() /
                                        (kGroup / kLanes * (128 + kOffset) << (kDigitBits - 1));
  static constexpr int kBits = kDigits * kDigitBits - 2;

  void Write(int64_t b) {
    const float* x = x_ + b * inputs_;
    int32_t greatest = 0;  // as bits, which are in order, and those of what is not finite the last
    for (int64_t i = 0; i < inputs_; ++i) {
      int32_t bits;
      std::memcpy(&bits, x + i, sizeof(bits));
      greatest = std::max(greatest, bits & 0x7FFFFFFF);
    }
    // Of what is not finite every output is NaN, as the sum would be.
    steps_[b] = std::numeric_limits<double>::quiet_NaN();
    wholes_[b] = 0;
    if (greatest >= 0x7F800000) return;
    // A power of two: integers stay what they are, and so do nearly all floats.
    int exponent = std::max(greatest >> 23, 30) - 126 - kBits;
    steps_[b] = std::ldexp(1.0, exponent);
    float per_step = std::ldexp(1.0f, -exponent);
    for (int64_t i = 0; i + kGroup <= inputs_; i += kGroup) {
      Digit* to = &digits_[kDigits * (B * i + b * kGroup)];
      int32_t rest[kGroup];
      for (int64_t j = 0; j < kGroup; ++j) {
        rest[j] = int32_t(__builtin_rintf(x[i + j] * per_step));
        wholes_[b] += rest[j];
      }
      for (int digit = 0; digit < kDigits; ++digit, to += kGroup)
        for (int64_t j = 0; j < kGroup; ++j) {
          int32_t higher = (rest[j] + (1 << (kDigitBits - 1))) >> kDigitBits;
          to[j] = Digit(rest[j] - higher * (1 << kDigitBits));
          rest[j] = higher;
        }
    }
  }

  int64_t inputs_;
  const float* x_;
  double steps_[B];
  int64_t wholes_[B];
  Aligned<Digit> digits_;
};
#if HAS_BYTE_PRODUCTS
template <int B>
using Int8Activations = DigitActivations<B>;
#else
// Without VNNI digits take twice the products of floats for every row of activations, and what is
// made float once serves all of them.
template <int B>
using Int8Activations =
    std::conditional_t<B == 1, DigitActivations<B>, FloatActivations<Int8, B>>;
#endif
#else
template <int B>
using Int8Activations = FloatActivations<Int8, B>;
#endif

template <int B>
using BFloat16Activations = FloatActivations<BFloat16, B>;
template <int B>
using Float32Activations = FloatActivations<Float32, B>;

// Threads that stay awake for a while after work. To wake one that sleeps, as those of XLA's pool do,
// takes as long as half a product of 2 MB, and a step of a decoder has a hundred products.
class Team {
 public:
  // work(part) of all parts, by at most so many threads; returns when all is done. Each thread does its
  // own share in order, so that what it has asked memory for beyond a part is of its next one, and then
  // the ends of others'. Of calls at the same time one has the threads, the others work alone: the
  // machine is busy.
  template <typename Work>
  static void Run(int64_t threads, int64_t parts, const Work& work) {
    static Team* team = new Team;  // never deleted, as its threads never end
    threads = std::min({threads, parts, kMostThreads});
    std::unique_lock<std::mutex> mine(team->caller_, std::defer_lock);
    if (threads == 1 || parts > kMostParts || !mine.try_lock()) {
      for (int64_t part = 0; part < parts; ++part) work(part);
      return;
    }
    team->Divide(threads, parts, [](const void* work, int64_t part) {
      (*static_cast<const Work*>(work))(part);
    }, &work);
  }

 private:
  using Call = void (*)(const void*, int64_t);
  static constexpr std::chrono::microseconds kAwake{300};
  static constexpr int64_t kMostThreads = 64, kMostParts = 0xFFFF;

  // What is left of a thread's parts, in one word: which call (32 bits), the first and the end (16 each).
  struct alignas(kLine) Share {
    std::atomic<uint64_t> left{0};
    static int64_t First(uint64_t left) { return left >> 16 & 0xFFFF; }
    static int64_t End(uint64_t left) { return left & 0xFFFF; }
    static bool Any(uint64_t left) { return First(left) != End(left); }
  };

  void Divide(int64_t threads, int64_t parts, Call call, const void* work) {
    call_ = call;
    work_ = work;
    done_ = 0;
    ++n_calls_;
    for (int64_t i = 0; i < threads; ++i)
      shares_[i].left = n_calls_ << 32 | uint64_t(parts * i / threads << 16 | parts * (i + 1) / threads);
    for (; n_threads_ < threads; ++n_threads_)
      std::thread([this, me = int64_t{n_threads_}] { Help(me); }).detach();
    if (asleep_) {
      { std::lock_guard<std::mutex> none_falls_asleep_now(sleep_); }
      wake_.notify_all();
    }
    while (Part(0)) continue;
    // Never for a part that nobody has begun: threads that get no core block nothing.
    while (done_ != parts) std::this_thread::yield();
  }

  // Does one part, if one is left.
  bool Part(int64_t me) {
    int64_t threads = n_threads_;
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares_[(me + i) % threads];
      uint64_t left = share.left;
      while (Share::Any(left)) {
        Call call = call_;
        const void* work = work_;
        // Where what is left is still the same, so is what was read after it.
        if (share.left.compare_exchange_strong(left, i == 0 ? left + (1 << 16) : left - 1)) {
          call(work, i == 0 ? Share::First(left) : Share::End(left) - 1);
          ++done_;
          return true;
        }
      }
    }
    return false;
  }

  bool AnyLeft() const {
    return std::any_of(shares_, shares_ + kMostThreads,
                       [](const Share& share) { return Share::Any(share.left); });
  }

  void Help(int64_t me) {
    for (;;) {
      auto until = std::chrono::steady_clock::now() + kAwake;
      while (std::chrono::steady_clock::now() < until) {
        if (Part(me)) until = std::chrono::steady_clock::now() + kAwake;
        else std::this_thread::yield();
      }
      std::unique_lock<std::mutex> lock(sleep_);
      ++asleep_;
      wake_.wait(lock, [this] { return AnyLeft(); });
      --asleep_;
    }
  }

  std::mutex caller_;
  uint64_t n_calls_ = 0;
  std::atomic<int64_t> n_threads_{1};  // the caller is one
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> work_{nullptr};
  Share shares_[kMostThreads];
  std::atomic<int64_t> done_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int64_t> asleep_{0};
};

constexpr int64_t kPartsPerThread = 4;        // threads are never equally fast
constexpr int64_t kBytesPerThread = 1 << 15;  // fewer take less time than to share them

// Tiles of R rows of a matrix, as long as there are so many.
template <int R, int B, typename Stored, typename Activations, typename Write>
inline void Tiles(const Activations& activations, const Stored* rows, int64_t stride, int64_t& row,
                  int64_t last, const Write& write) {
  for (; row + R <= last; row += R) {
    float out[R][B];
    activations.template Tile<R>(rows + row * stride, stride, out);
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) write(row + r, b, out[r][b]);
  }
}

// write(row, b, product) for rows first to last.
template <int B, typename Stored, typename Activations, typename Write>
inline void Multiply(const Activations& activations, const Stored* rows, int64_t stride,
                     int64_t first, int64_t last, const Write& write) {
  Tiles<Activations::kRows, B>(activations, rows, stride, first, last, write);
  Tiles<1, B>(activations, rows, stride, first, last, write);
}

// work(b, std::integral_constant<int, B>) for blocks of B rows from b on.
template <typename Work>
inline void Blocks(int64_t batch, const Work& work) {
  int64_t b = 0;
  for (; b + 4 <= batch; b += 4) work(b, std::integral_constant<int, 4>());
  for (; b + 2 <= batch; b += 2) work(b, std::integral_constant<int, 2>());
  for (; b < batch; ++b) work(b, std::integral_constant<int, 1>());
}

template <typename Stored, template <int> class Activations>
ffi::Error AllRows(int64_t threads, const void* data, const float* scale,
                   ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::F32>& y) {
  int64_t batch = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y.dimensions()[1];
  const Stored* rows = static_cast<const Stored*>(data);
  int64_t bytes = outputs * inputs * int64_t{sizeof(Stored)};
  threads = std::clamp<int64_t>(bytes / kBytesPerThread, 1, threads);
  int64_t parts = threads == 1 ? 1 : threads * kPartsPerThread;
  Blocks(batch, [&](int64_t b, auto block) {
    constexpr int B = block;
    Activations<B> activations(x.typed_data() + b * inputs, inputs);
    float* to = y.typed_data() + b * outputs;
    Team::Run(threads, parts, [&](int64_t part) {
      int64_t first = part * outputs / parts, last = (part + 1) * outputs / parts;
      // The tiles ask for what lies kAhead behind them: not for the beginning.
      Prefetch(rows + first * inputs, std::min(kAhead, (last - first) * inputs * int64_t{sizeof(Stored)}));
      Multiply<B>(activations, rows, inputs, first, last,
                  [&](int64_t output, int b, float product) {
                    to[b * outputs + output] = scale ? product * scale[output] : product;
                  });
    });
  });
  return ffi::Error::Success();
}

ffi::Error Int8Rows(ffi::BufferR2<ffi::S8> rows, ffi::BufferR1<ffi::F32> scale,
                    ffi::BufferR2<ffi::F32> x, ffi::Result<ffi::BufferR2<ffi::F32>> y,
                    int64_t threads) {
  return AllRows<Int8, Int8Activations>(threads, rows.untyped_data(), scale.typed_data(), x, *y);
}

ffi::Error BFloat16Rows(ffi::BufferR2<ffi::BF16> rows, ffi::BufferR2<ffi::F32> x,
                        ffi::Result<ffi::BufferR2<ffi::F32>> y, int64_t threads) {
  return AllRows<BFloat16, BFloat16Activations>(threads, rows.untyped_data(), nullptr, x, *y);
}

// e^x of x <= 0, to 2^-22 of itself; of what is below -87, nearly nothing. By the coefficients of
// Cephes' expf.
inline Floats Exp(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  constexpr float kToInteger = 3 << 22;  // added, it leaves no bits behind the point
  Floats shifted = x * 1.44269504f + kToInteger;
  Floats n = shifted - kToInteger;
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * reinterpret_cast<Floats>((reinterpret_cast<Words>(shifted) + 127) << 23);
}

// Makes e^(score - greatest) of scores and adds them up.
inline float ExpSum(float* scores, int64_t n, float greatest) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats weights = Exp(Load<Floats>(scores + i) - greatest);
    std::memcpy(scores + i, &weights, sizeof(weights));
    sums += weights;
  }
  float sum = Sum(sums);
  for (; i < n; ++i) sum += scores[i] = std::exp(scores[i] - greatest);
  return sum;
}

// Attention of one new token of each row: over a prompt's slots, which P branches of S rows share,
// over the row's own past, and over the token itself. Sizes: H heads of K numbers, T and G slots.
template <typename Stored>
struct CachedAttention {
  const float *q, *k, *v;                 // [P, S, H, K]
  const Stored *keys, *values;            // [P, H, T, K], [P, H, K, T]
  const bool* visible;                    // [P, T]
  const Stored *past_keys, *past_values;  // [P, S, H, G, K], [P, S, H, K, G]
  float* out;                             // [P, S, H, K]
  int64_t sequences, heads, width, slots, past_slots, filled;

  void Head(int64_t branch, int64_t head) const {
    Blocks(sequences, [&](int64_t s, auto block) {
      Rows<block>(branch, branch * sequences + s, head);
    });
  }

  template <int B>
  void Rows(int64_t branch, int64_t row, int64_t head) const {
    const bool* sees = visible + branch * slots;
    int64_t seen = slots, shared = (branch * heads + head) * slots * width;
    while (seen > 0 && !sees[seen - 1]) --seen;
    Aligned<float> queries(B * width), to_prompt(B * seen), to_past(B * filled);
    float to_new[B], sums[B];
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = 0; i < width; ++i)
        queries[b * width + i] = q[At(row + b, head) + i] / std::sqrt(float(width));

    Multiply<B>(FloatActivations<Stored, B>(&queries[0], width), keys + shared, width, 0, seen,
                [&](int64_t slot, int b, float score) {
                  to_prompt[b * seen + slot] =
                      sees[slot] ? score : std::numeric_limits<float>::lowest();
                });
    for (int64_t b = 0; b < B; ++b) {
      int64_t at = At(row + b, head);
      float *of_prompt = &to_prompt[b * seen], *of_past = &to_past[b * filled];
      Multiply<1>(FloatActivations<Stored, 1>(&queries[b * width], width),
                  past_keys + at * past_slots, width, 0, filled,
                  [&](int64_t slot, int, float score) { of_past[slot] = score; });
      to_new[b] = 0;
      for (int64_t i = 0; i < width; ++i) to_new[b] += queries[b * width + i] * k[at + i];
      float greatest = to_new[b];
      for (int64_t i = 0; i < seen; ++i) greatest = std::max(greatest, of_prompt[i]);
      for (int64_t i = 0; i < filled; ++i) greatest = std::max(greatest, of_past[i]);
      to_new[b] = std::exp(to_new[b] - greatest);
      sums[b] = ExpSum(of_prompt, seen, greatest) + ExpSum(of_past, filled, greatest) + to_new[b];
    }

    Multiply<B>(FloatActivations<Stored, B>(&to_prompt[0], seen), values + shared, slots, 0, width,
                [&](int64_t i, int b, float sum) { out[At(row + b, head) + i] = sum; });
    for (int64_t b = 0; b < B; ++b) {
      int64_t at = At(row + b, head);
      Multiply<1>(FloatActivations<Stored, 1>(&to_past[b * filled], filled),
                  past_values + at * past_slots, past_slots, 0, width,
                  [&](int64_t i, int, float sum) { out[at + i] += sum; });
      for (int64_t i = 0; i < width; ++i)
        out[at + i] = (out[at + i] + to_new[b] * v[at + i]) / sums[b];
    }
  }

 private:
  int64_t At(int64_t row, int64_t head) const { return (row * heads + head) * width; }
};

template <typename Stored>
void Attend(ffi::BufferR3<ffi::F32> q, ffi::BufferR3<ffi::F32> k, ffi::BufferR3<ffi::F32> v,
            ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::BufferR2<ffi::PRED> visible,
            ffi::AnyBuffer past_keys, ffi::AnyBuffer past_values, int64_t filled, float* out,
            int64_t threads) {
  int64_t branches = keys.dimensions()[0], rows = q.dimensions()[0], heads = q.dimensions()[1];
  auto stored = [](ffi::AnyBuffer buffer) {
    return static_cast<const Stored*>(buffer.untyped_data());
  };
  CachedAttention<Stored> attention{
      q.typed_data(), k.typed_data(), v.typed_data(), stored(keys), stored(values),
      visible.typed_data(), stored(past_keys), stored(past_values), out, rows / branches, heads,
      q.dimensions()[2], keys.dimensions()[2], past_keys.dimensions()[2], filled};
  Team::Run(threads, branches * heads, [&](int64_t part) {
    attention.Head(part / heads, part % heads);
  });
}

// The dtype of the cache is float32, or bfloat16, which may come as its bits.
ffi::Error Attention(ffi::BufferR3<ffi::F32> q, ffi::BufferR3<ffi::F32> k,
                     ffi::BufferR3<ffi::F32> v, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::BufferR2<ffi::PRED> visible, ffi::AnyBuffer past_keys,
                     ffi::AnyBuffer past_values, ffi::BufferR0<ffi::S32> filled,
                     ffi::Result<ffi::BufferR3<ffi::F32>> out, int64_t threads) {
  auto attend = keys.element_type() == ffi::F32 ? Attend<Float32> : Attend<BFloat16>;
  attend(q, k, v, keys, values, visible, past_keys, past_values, *filled.typed_data(),
         out->typed_data(), threads);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(int8_rows, Int8Rows,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR2<ffi::S8>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(bfloat16_rows, BFloat16Rows,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR2<ffi::BF16>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(cached_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR2<ffi::PRED>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Ret<ffi::BufferR3<ffi::F32>>()
                                  .Attr<int64_t>("threads"));
