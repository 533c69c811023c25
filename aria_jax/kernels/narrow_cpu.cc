// x @ (rows * scale).T of int8 or bfloat16 rows and a few float32 rows x, as XLA FFI handlers.
//
// Values become numbers of a vector register on their way to a product, at a cost low enough that
// memory is all that a product with one row of activations waits for:
// - bfloat16: of a 32-bit word a shift makes one float, a mask the other.
// - int8, on x86: activations are written as two 14-bit digits of a common step, as exact as float32
//   is, and multiplied as integers (VNNI, or the multiply-add of pairs that AVX2 has).
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
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
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
typedef int16_t Halves __attribute__((vector_size(kVectorBytes)));

// Bytes that are asked for before they are needed: a core has too few reads under way on its own,
// and its prefetchers stop at every page.
constexpr int64_t kAhead = 1024;

template <typename Vector>
inline Vector Load(const void* from) {
  Vector loaded;
  std::memcpy(&loaded, from, sizeof(loaded));
  return loaded;
}

template <typename Vector>
inline double Sum(Vector lanes) {
  double total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
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
    int64_t i = 0;
    for (; i + kGroup <= inputs_; i += kGroup) {
      Words words[R];
      for (int r = 0; r < R; ++r) {
        const Stored* from = rows + r * inputs_ + i;
        __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
        words[r] = Load<Words>(from);
      }
      Multiply<R, 0>(words, &reordered_[B * i], sums);
    }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        out[r][b] = float(Sum(sums[r][b])) + Rest(rows + r * inputs_, x_ + b * inputs_, i, inputs_);
  }

 private:
  template <int R, int kPlace>
  static void Multiply(const Words (&words)[R], const float* x, Floats (&sums)[R][B]) {
    Floats weights[R];
    for (int r = 0; r < R; ++r) weights[r] = Stored::template Spread<kPlace>(words[r]);
    for (int b = 0; b < B; ++b) {
      Floats activations = Load<Floats>(x + b * kLanes);
      for (int r = 0; r < R; ++r) sums[r][b] += weights[r] * activations;
    }
    if constexpr (kPlace + 1 < Stored::kPerWord)
      Multiply<R, kPlace + 1>(words, x + B * kLanes, sums);
  }

  int64_t inputs_;
  const float* x_;
  Aligned<float> reordered_;
};

#if HAS_PAIRS

// sum + a[2i] * b[2i] + a[2i + 1] * b[2i + 1] for every word i.
inline Words MultiplyPairs(Halves a, Halves b, Words sum) {
#if defined(__AVX512BW__)
  __m512i a_bits = reinterpret_cast<__m512i>(a), b_bits = reinterpret_cast<__m512i>(b);
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Words>(
      _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), a_bits, b_bits));
#else
  return sum + reinterpret_cast<Words>(_mm512_madd_epi16(a_bits, b_bits));
#endif
#else
  __m256i a_bits = reinterpret_cast<__m256i>(a), b_bits = reinterpret_cast<__m256i>(b);
#if defined(__AVXVNNI__)
  return reinterpret_cast<Words>(
      _mm256_dpwssd_avx_epi32(reinterpret_cast<__m256i>(sum), a_bits, b_bits));
#else
  return sum + reinterpret_cast<Words>(_mm256_madd_epi16(a_bits, b_bits));
#endif
#endif
}

// One row of activations as integers: (high * 2^14 + low) * step, either digit of at most 2^13.
class DigitActivations {
 public:
  static constexpr int64_t kGroup = kVectorBytes;
  static constexpr int kRows = 4;

  DigitActivations(const float* x, int64_t inputs) : inputs_(inputs), x_(x), digits_(2 * inputs) {
    float greatest = 0;
    bool finite = true;
    for (int64_t i = 0; i < inputs; ++i) {
      float magnitude = std::fabs(x[i]);
      greatest = magnitude > greatest ? magnitude : greatest;
      finite &= magnitude <= std::numeric_limits<float>::max();
    }
    // A power of two: integers stay what they are, and so do nearly all floats.
    int exponent = 0;
    std::frexp(greatest, &exponent);
    // Of what is not finite every output is NaN, as the sum would be.
    step_ = finite ? std::ldexp(1.0, exponent - 26) : std::numeric_limits<double>::quiet_NaN();
    if (finite) Write(1 / step_);
  }

  template <int R>
  void Tile(const Int8* rows, float (&out)[R][1]) const {
    double totals[R] = {};
    int64_t i = 0;
    while (i + kGroup <= inputs_) {
      // A pair adds 2 * 2^7 * 2^13 at most to a word, so 2^10 pairs fit; a group has two.
      int64_t stop = std::min(inputs_, i + 511 * kGroup);
      Words high[R] = {}, low[R] = {};
      for (; i + kGroup <= stop; i += kGroup) {
        const int16_t* x = &digits_[2 * i];
        for (int r = 0; r < R; ++r) {
          const Int8* from = rows + r * inputs_ + i;
          __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
          Halves halves = Load<Halves>(from), even = (halves << 8) >> 8, odd = halves >> 8;
          high[r] = MultiplyPairs(even, Load<Halves>(x), high[r]);
          low[r] = MultiplyPairs(even, Load<Halves>(x + kHalves), low[r]);
          high[r] = MultiplyPairs(odd, Load<Halves>(x + 2 * kHalves), high[r]);
          low[r] = MultiplyPairs(odd, Load<Halves>(x + 3 * kHalves), low[r]);
        }
      }
      for (int r = 0; r < R; ++r) totals[r] += Sum(high[r]) * (1 << 14) + Sum(low[r]);
    }
    for (int r = 0; r < R; ++r)
      out[r][0] = float(totals[r] * step_) + Rest(rows + r * inputs_, x_, i, inputs_);
  }

 private:
  static constexpr int64_t kHalves = kGroup / 2;

  // Of every group the high digits of even values, their low ones, and both of odd values.
  void Write(double per_step) {
    for (int64_t i = 0; i + kGroup <= inputs_; i += kGroup) {
      int32_t high[kGroup], low[kGroup];
      for (int64_t j = 0; j < kGroup; ++j) {
        double scaled = x_[i + j] * per_step;
        int32_t whole = int32_t(scaled + std::copysign(0.5, scaled));
        high[j] = (whole + (1 << 13)) >> 14;
        low[j] = whole - high[j] * (1 << 14);
      }
      int16_t* to = &digits_[2 * i];
      for (int64_t j = 0; j < kHalves; ++j) {
        to[j] = high[2 * j];
        to[kHalves + j] = low[2 * j];
        to[2 * kHalves + j] = high[2 * j + 1];
        to[3 * kHalves + j] = low[2 * j + 1];
      }
    }
  }

  int64_t inputs_;
  const float* x_;
  double step_;
  Aligned<int16_t> digits_;
};
using Int8Activations = DigitActivations;
#else
using Int8Activations = FloatActivations<Int8, 1>;
#endif

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

template <typename Stored, typename Activations1>
ffi::Error AllRows(ffi::ThreadPool& pool, int64_t threads, const void* data, const float* scale,
                   ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::F32>& y) {
  int64_t batch = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y.dimensions()[1];
  const Stored* rows = static_cast<const Stored*>(data);
  const float* from = x.typed_data();
  float* to = y.typed_data();
  int64_t b = 0;
  for (; b + 4 <= batch; b += 4)
    Multiply<Stored, 4, FloatActivations<Stored, 4>>(
        pool, threads, rows, scale, from + b * inputs, to + b * outputs, outputs, inputs);
  for (; b + 2 <= batch; b += 2)
    Multiply<Stored, 2, FloatActivations<Stored, 2>>(
        pool, threads, rows, scale, from + b * inputs, to + b * outputs, outputs, inputs);
  for (; b < batch; ++b)
    Multiply<Stored, 1, Activations1>(
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
  return AllRows<BFloat16, FloatActivations<BFloat16, 1>>(pool, threads, rows.untyped_data(), nullptr,
                                                        x, *y);
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
