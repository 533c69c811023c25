// x @ (rows * scale).T of int8 or bfloat16 rows and a few float32 rows x, as XLA FFI handlers.
//
// Values become numbers of a vector register on their way to a product, at a cost low enough that
// memory is all that a product with one row of activations waits for:
// - bfloat16: of a 32-bit word a shift makes one float, a mask the other.
// - int8, on x86: activations are written as integers of a common step, and those as digits of a byte,
//   which are multiplied as integers (VNNI, or the multiply-adds that AVX2 has).
// - int8 elsewhere: of a 32-bit word two shifts and a conversion make a float.
//
// Sizes: B rows of activations, O outputs, I inputs.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
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
inline void Prefetch(const char* from) { __builtin_prefetch(from + kAhead, 0, 2); }

template <typename Vector>
inline Vector Load(const void* from) {
  Vector loaded;
  std::memcpy(&loaded, from, sizeof(loaded));
  return loaded;
}

#if defined(__AVX512BW__)
inline float Sum(Floats lanes) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(lanes)); }
inline int32_t Sum(Words lanes) { return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(lanes)); }
#else
template <typename Vector>
inline auto Sum(Vector lanes) {
  auto total = lanes[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}
#endif

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
  static constexpr std::size_t kLine = 64;
  std::vector<Number> storage_;
  Number* begin_;
};

struct Int8 {
  int8_t stored;
  static constexpr int kPerWord = 4;
  float Value() const { return stored; }
  template <int kPlace>
  static Floats Spread(Words words) {
    return __builtin_convertvector((words << (24 - 8 * kPlace)) >> 24, Floats);
  }
};

struct BFloat16 {
  uint16_t stored;
  static constexpr int kPerWord = 2;
  float Value() const {
    uint32_t bits = uint32_t{stored} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  template <int kPlace>
  static Floats Spread(Words words) {
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

// B rows of activations as floats, in the order in which words give values.
template <typename Stored, int B>
class FloatActivations {
 public:
  static constexpr int64_t kGroup = kLanes * Stored::kPerWord;
  static constexpr int kRows = B == 4 ? 2 : 4;  // as many sums as registers hold

  FloatActivations(const float* x, int64_t inputs)
      : inputs_(inputs), x_(x), reordered_(B * inputs) {
    float* to = &reordered_[0];
    for (int64_t i = 0; i + kGroup <= inputs; i += kGroup)
      for (int64_t place = 0; place < Stored::kPerWord; ++place)
        for (int64_t b = 0; b < B; ++b)
          for (int64_t word = 0; word < kLanes; ++word)
            *to++ = x[b * inputs + i + word * Stored::kPerWord + place];
  }

  // out[r][b] of R rows; what is read and spread once serves all B.
  template <int R>
  void Tile(const Stored* rows, float (&out)[R][B]) const {
    Floats sums[R][B] = {};
    const char* in_order = reinterpret_cast<const char*>(rows);
    int64_t i = 0;
    for (; i + kGroup <= inputs_; i += kGroup) {
      Words words[R];
      for (int r = 0; r < R; ++r) {
        Prefetch(in_order + r * kVectorBytes);
        words[r] = Load<Words>(rows + r * inputs_ + i);
      }
      in_order += R * kVectorBytes;
      Multiply<R, 0>(words, &reordered_[B * i], sums);
    }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        out[r][b] = Sum(sums[r][b]) + Rest(rows + r * inputs_, x_ + b * inputs_, i, inputs_);
  }

 private:
  template <int R, int kPlace>
  static void Multiply(const Words (&words)[R], const float* x, Floats (&sums)[R][B]) {
    Floats weights[R];
    for (int r = 0; r < R; ++r) weights[r] = Stored::template Spread<kPlace>(words[r]);
    for (int b = 0; b < B; ++b) {
      Floats activations = LoadOnce<Floats>(x + b * kLanes);
      for (int r = 0; r < R; ++r) sums[r][b] += weights[r] * activations;
    }
    if constexpr (kPlace + 1 < Stored::kPerWord)
      Multiply<R, kPlace + 1>(words, x + B * kLanes, sums);
  }

  int64_t inputs_;
  const float* x_;
  Aligned<float> reordered_;
};

#if HAS_BYTE_PRODUCTS

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int kDigits = 3, kDigitBits = 8;
#else
constexpr int kDigits = 4, kDigitBits = 7;  // of two products the sum must fit into 16 bits
#endif

constexpr int kSums = kVectorBytes == 64 ? 24 : 12;  // that registers hold, beside factors

// sum + the four products of bytes in every word, those of `digits` signed.
inline Words MultiplyBytes(Bytes weights, Bytes digits, Words sum) {
#if defined(__AVX512BW__)
  __m512i a = reinterpret_cast<__m512i>(weights), b = reinterpret_cast<__m512i>(digits);
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Words>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), a, b));
#else
  __m512i pairs = _mm512_maddubs_epi16(a, b);
  return sum + reinterpret_cast<Words>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
#else
  __m256i a = reinterpret_cast<__m256i>(weights), b = reinterpret_cast<__m256i>(digits);
#if defined(__AVXVNNI__)
  return reinterpret_cast<Words>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum), a, b));
#else
  __m256i pairs = _mm256_maddubs_epi16(a, b);
  return sum + reinterpret_cast<Words>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
#endif
}

// B rows of activations, each as integers of a step of its own: of at most 22 bits with VNNI, so that
// the error is 2^-22 of the greatest value at most, and 26 without.
template <int B>
class DigitActivations {
 public:
  static constexpr int64_t kGroup = kVectorBytes;
  static constexpr int kRows = std::clamp(kSums / (B * kDigits), 1, 4);

  DigitActivations(const float* x, int64_t inputs)
      : inputs_(inputs), x_(x), digits_(B * kDigits * inputs) {
    for (int64_t b = 0; b < B; ++b) Write(b);
  }

  template <int R>
  void Tile(const Int8* rows, float (&out)[R][B]) const {
    int64_t totals[R][B] = {};
    const char* in_order = reinterpret_cast<const char*>(rows);
    int64_t i = 0;
    while (i + kGroup <= inputs_) {
      int64_t stop = std::min(inputs_, i + kMaxGroups * kGroup);
      Words sums[R][B][kDigits] = {};
      for (; i + kGroup <= stop; i += kGroup) {
        Bytes weights[R];
        for (int r = 0; r < R; ++r) {
          Prefetch(in_order + r * kVectorBytes);
          // w + 128, as one factor must have no sign.
          weights[r] = Load<Bytes>(rows + r * inputs_ + i) ^ 0x80;
        }
        in_order += R * kVectorBytes;
        const int8_t* x = &digits_[B * kDigits * i];
        for (int b = 0; b < B; ++b)
          for (int digit = 0; digit < kDigits; ++digit, x += kVectorBytes) {
            Bytes digits = LoadOnce<Bytes>(x);
            for (int r = 0; r < R; ++r)
              sums[r][b][digit] = MultiplyBytes(weights[r], digits, sums[r][b][digit]);
          }
      }
      for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
          for (int digit = 0; digit < kDigits; ++digit)
            totals[r][b] += int64_t{Sum(sums[r][b][digit])} << (kDigitBits * digit);
    }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        out[r][b] = float((totals[r][b] - 128 * wholes_[b]) * steps_[b]) +
                    Rest(rows + r * inputs_, x_ + b * inputs_, i, inputs_);
  }

 private:
  // After as many a sum of lanes might not fit into 32 bits.
  static constexpr int64_t kMaxGroups =
      std::numeric_limits<int32_t>::max() / (kVectorBytes * 255 << (kDigitBits - 1));
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
      int8_t* to = &digits_[kDigits * (B * i + b * kGroup)];
      int32_t rest[kGroup];
      for (int64_t j = 0; j < kGroup; ++j) {
        rest[j] = int32_t(__builtin_rintf(x[i + j] * per_step));
        wholes_[b] += rest[j];
      }
      for (int digit = 0; digit < kDigits; ++digit, to += kGroup)
        for (int64_t j = 0; j < kGroup; ++j) {
          int32_t higher = (rest[j] + (1 << (kDigitBits - 1))) >> kDigitBits;
          to[j] = int8_t(rest[j] - higher * (1 << kDigitBits));
          rest[j] = higher;
        }
    }
  }

  int64_t inputs_;
  const float* x_;
  double steps_[B];
  int64_t wholes_[B];
  Aligned<int8_t> digits_;
};
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
template <int B>
using Int8Activations = DigitActivations<B>;
#else
// Without VNNI a product of digits takes three instructions for every row of activations, while what
// is made float once serves all of them.
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

// One product, shared by the threads that work on it. The last one frees it: a task may begin after
// the call has returned, and finds nothing left to do.
template <typename Stored, int B, typename Activations>
class Product {
 public:
  Product(const Stored* rows, const float* scale, const float* x, float* y, int64_t outputs,
          int64_t inputs, int64_t parts)
      : rows_(rows), scale_(scale), y_(y), outputs_(outputs), inputs_(inputs), parts_(parts),
        activations_(x, inputs) {}

  // Takes parts until none is left.
  void Work() {
    for (int64_t part; (part = next_.fetch_add(1)) < parts_; done_.fetch_add(1)) {
      int64_t output = part * outputs_ / parts_, last = (part + 1) * outputs_ / parts_;
      Tiles<Activations::kRows>(output, last);
      Tiles<1>(output, last);
    }
  }

  bool Done() const { return done_.load() == parts_; }

 private:
  template <int R>
  void Tiles(int64_t& output, int64_t last) {
    for (; output + R <= last; output += R) {
      float out[R][B];
      activations_.template Tile<R>(rows_ + output * inputs_, out);
      for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
          y_[b * outputs_ + output + r] = scale_ ? out[r][b] * scale_[output + r] : out[r][b];
    }
  }

  const Stored* rows_;
  const float* scale_;
  float* y_;
  int64_t outputs_, inputs_, parts_;
  Activations activations_;
  std::atomic<int64_t> next_{0}, done_{0};
};

constexpr int64_t kPartsPerThread = 4;        // threads are never equally fast
constexpr int64_t kBytesPerThread = 1 << 15;  // fewer take less time than waking a thread

template <typename Stored, int B, typename Activations>
void Multiply(ffi::ThreadPool& pool, int64_t threads, const Stored* rows, const float* scale,
              const float* x, float* y, int64_t outputs, int64_t inputs) {
  int64_t bytes = outputs * inputs * int64_t{sizeof(Stored)};
  threads = std::max<int64_t>(1, std::min(threads, bytes / kBytesPerThread));
  auto product = std::make_shared<Product<Stored, B, Activations>>(
      rows, scale, x, y, outputs, inputs, threads == 1 ? 1 : threads * kPartsPerThread);
  for (int64_t thread = 1; thread < threads; ++thread) pool.Schedule([product] { product->Work(); });
  product->Work();
  // Never for a part that nobody has begun: a busy pool, or one of one thread, blocks nothing.
  while (!product->Done()) std::this_thread::yield();
}

template <typename Stored, template <int> class Activations>
ffi::Error AllRows(ffi::ThreadPool& pool, int64_t threads, const void* data, const float* scale,
                   ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::F32>& y) {
  int64_t batch = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y.dimensions()[1];
  const Stored* rows = static_cast<const Stored*>(data);
  const float* from = x.typed_data();
  float* to = y.typed_data();
  int64_t b = 0;
  for (; b + 4 <= batch; b += 4)
    Multiply<Stored, 4, Activations<4>>(
        pool, threads, rows, scale, from + b * inputs, to + b * outputs, outputs, inputs);
  for (; b + 2 <= batch; b += 2)
    Multiply<Stored, 2, Activations<2>>(
        pool, threads, rows, scale, from + b * inputs, to + b * outputs, outputs, inputs);
  for (; b < batch; ++b)
    Multiply<Stored, 1, Activations<1>>(
        pool, threads, rows, scale, from + b * inputs, to + b * outputs, outputs, inputs);
  return ffi::Error::Success();
}

ffi::Error Int8Rows(ffi::ThreadPool pool, ffi::BufferR2<ffi::S8> rows, ffi::BufferR1<ffi::F32> scale,
                    ffi::BufferR2<ffi::F32> x, ffi::Result<ffi::BufferR2<ffi::F32>> y,
                    int64_t threads) {
  return AllRows<Int8, Int8Activations>(pool, threads, rows.untyped_data(), scale.typed_data(), x,
                                         *y);
}

ffi::Error BFloat16Rows(ffi::ThreadPool pool, ffi::BufferR2<ffi::BF16> rows,
                        ffi::BufferR2<ffi::F32> x, ffi::Result<ffi::BufferR2<ffi::F32>> y,
                        int64_t threads) {
  return AllRows<BFloat16, BFloat16Activations>(pool, threads, rows.untyped_data(), nullptr, x, *y);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(int8_rows, Int8Rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::S8>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(bfloat16_rows, BFloat16Rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::BF16>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<int64_t>("threads"));
