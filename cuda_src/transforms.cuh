// The transforms of a block (FORMAT.md, section 5), of lines of a tile in shared memory.
//
// A tile is B x B floats, 16-byte chunks of a row exchanged by row: neither the reading of rows in 16 bytes nor that of
// columns meets a bank twice.
#include "vector_io.cuh"

constexpr int NO_TRANSFORM = 0, DCT = 1, HADAMARD = 2, DWT_HAAR = 3, DWT_DB2 = 4, DWT_BIOR = 5;

// Element of a row-major tile of rows of `block` floats, chunks exchanged.
__device__ __forceinline__ int tile_at(int block, int row, int col) {
  return row * block + (col & ~31) + ((((col >> 2) ^ row) & 7) << 2) + (col & 3);
}
template <int B>
__device__ __forceinline__ int tile_at(int row, int col) {
  return tile_at(B, row, col);
}

__device__ constexpr double cosine(int numerator, int denominator) {  // cos(pi numerator / denominator), 0 to pi / 2
  double x = 3.14159265358979323846 * numerator / denominator, term = 1.0, sum = 1.0;
  for (int n = 2; n < 32; n += 2) {
    term *= -x * x / (n * (n - 1));
    sum += term;
  }
  return sum;
}

constexpr float ROOT_2 = 1.41421356237309505f;

template <int N>
__device__ __forceinline__ void dct_2(float (&v)[N]);

// u, w = the pairs (v[n], v[M-1-n]) turned by -(2n+1) pi / (4M); every other w negated.
template <int M, int n = 0>
__device__ __forceinline__ void turn(const float (&v)[M], float (&u)[M / 2], float (&w)[M / 2]) {
  constexpr float C = static_cast<float>(cosine(2 * n + 1, 4 * M));
  constexpr float S = static_cast<float>(cosine(2 * M - 2 * n - 1, 4 * M));
  u[n] = fmaf(C, v[n], S * v[M - 1 - n]);
  float t = fmaf(C, v[M - 1 - n], -S * v[n]);
  w[n] = n % 2 ? -t : t;
  if constexpr (n + 1 < M / 2) turn<M, n + 1>(v, u, w);
}

// sqrt(N) times the orthonormal DCT-IV, y[k] = sum_n v[n] sqrt(2) cos((2n+1)(2k+1) pi / (4N)).
template <int N>
__device__ __forceinline__ void dct_4(float (&v)[N]) {
  if constexpr (N > 1) {
    constexpr int H = N / 2;
    float u[H], w[H];
    turn<N>(v, u, w);
    dct_2(u);
    dct_2(w);
    v[0] = ROOT_2 * u[0];
    v[N - 1] = -ROOT_2 * w[0];
#pragma unroll
    for (int m = 1; m < H; ++m) {
      v[2 * m] = u[m] + w[H - m];
      v[2 * m - 1] = u[m] - w[H - m];
    }
  }
}

// sqrt(N) times the orthonormal DCT-II: S^T v.
template <int N>
__device__ __forceinline__ void dct_2(float (&v)[N]) {
  if constexpr (N > 1) {
    constexpr int H = N / 2;
    float s[H], d[H];
#pragma unroll
    for (int n = 0; n < H; ++n) {
      s[n] = v[n] + v[N - 1 - n];
      d[n] = v[n] - v[N - 1 - n];
    }
    dct_2(s);
    dct_4(d);
#pragma unroll
    for (int k = 0; k < H; ++k) {
      v[2 * k] = s[k];
      v[2 * k + 1] = d[k];
    }
  }
}

// sqrt(N) times the orthonormal DCT-III: S v.
template <int N>
__device__ __forceinline__ void dct_3(float (&v)[N]) {
  if constexpr (N > 1) {
    constexpr int H = N / 2;
    float s[H], d[H];
#pragma unroll
    for (int k = 0; k < H; ++k) {
      s[k] = v[2 * k];
      d[k] = v[2 * k + 1];
    }
    dct_3(s);
    dct_4(d);
#pragma unroll
    for (int n = 0; n < H; ++n) {
      v[n] = s[n] + d[n];
      v[N - 1 - n] = s[n] - d[n];
    }
  }
}

// sqrt(N) times the Hadamard transform, its own transpose.
template <int N>
__device__ __forceinline__ void hadamard(float (&v)[N]) {
#pragma unroll
  for (int step = 1; step < N; step *= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if ((i & step) == 0) {
        float a = v[i], b = v[i + step];
        v[i] = a + b;
        v[i + step] = a - b;
      }
    }
  }
}

// Low-pass and high-pass filter of a wavelet.
struct Taps {
  float h[4], g[4];
};

__device__ __forceinline__ Taps taps_of(int transform) {
  constexpr float A = 0.70710678118654752f;                                                      // 1 / sqrt 2
  constexpr float D0 = 0.48296291314453415f, D1 = 0.83651630373780791f, D2 = 0.22414386804201339f,  // Daubechies
                  D3 = -0.12940952255126037f;
  constexpr float E = 0.17677669529663689f;  // sqrt 2 / 8
  if (transform == DWT_HAAR) return {{A, A, 0.0f, 0.0f}, {A, -A, 0.0f, 0.0f}};
  if (transform == DWT_DB2) return {{D0, D1, D2, D3}, {D3, -D2, D1, -D0}};
  return {{E, 3 * E, 3 * E, E}, {-2 * E, -6 * E, 6 * E, 2 * E}};
}

// Two values of a synthesis step from a pair of coefficients and the pair before it.
__device__ __forceinline__ void join(const Taps& t, float a, float d, float a0, float d0, float& even, float& odd) {
  even = fmaf(t.h[0], a, fmaf(t.g[0], d, fmaf(t.h[2], a0, t.g[2] * d0)));
  odd = fmaf(t.h[1], a, fmaf(t.g[1], d, fmaf(t.h[3], a0, t.g[3] * d0)));
}

// S v: steps of length 8, 16, ... LAST, in place.
template <int N, int LAST = N, int L = 8>
__device__ __forceinline__ void dwt_synthesis(const Taps& t, float (&v)[N]) {
  float x[L];
#pragma unroll
  for (int k = 0; k < L / 2; ++k) {
    int k0 = (k + L / 2 - 1) % (L / 2);
    join(t, v[k], v[L / 2 + k], v[k0], v[L / 2 + k0], x[2 * k], x[2 * k + 1]);
  }
#pragma unroll
  for (int i = 0; i < L; ++i) v[i] = x[i];
  if constexpr (L < LAST) dwt_synthesis<N, LAST, 2 * L>(t, v);
}

__device__ __forceinline__ float dot4(const float (&f)[4], float a, float b, float c, float d) {
  return fmaf(f[0], a, fmaf(f[1], b, fmaf(f[2], c, f[3] * d)));
}

// S^T v: steps of length N, N / 2, ... 8, in place.
template <int N, int L = N>
__device__ __forceinline__ void dwt_transposed(const Taps& t, float (&v)[N]) {
  float x[L];
#pragma unroll
  for (int i = 0; i < L; ++i) x[i] = v[i];
#pragma unroll
  for (int k = 0; k < L / 2; ++k) {
    int i = 2 * k, j = (2 * k + 2) % L;
    v[k] = dot4(t.h, x[i], x[i + 1], x[j], x[j + 1]);
    v[L / 2 + k] = dot4(t.g, x[i], x[i + 1], x[j], x[j + 1]);
  }
  if constexpr (L > 8) dwt_transposed<N, L / 2>(t, v);
}

// A row of a tile, or a column.
template <int B>
struct Line {
  float* tile;
  int index;
  bool column;

  __device__ __forceinline__ float& at(int i) const {
    return tile[column ? tile_at<B>(i, index) : tile_at<B>(index, i)];
  }
  // The line from its element `first`, a multiple of 32, on: there chunks are exchanged alike.
  __device__ __forceinline__ Line from(int first) const { return {tile + (column ? first * B : first), index, column}; }
  // Elements first ... first + 3, a multiple of 4.
  __device__ __forceinline__ void load_four(int first, float (&v)[4]) const {
    if (!column) return load<4>(&at(first), v);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = at(first + i);
  }
  __device__ __forceinline__ void store_four(int first, const float (&v)[4]) const {
    if (!column) return store<4>(&at(first), v);
#pragma unroll
    for (int i = 0; i < 4; ++i) at(first + i) = v[i];
  }
  // v[i] = element FIRST + STEP i
  template <int FIRST, int STEP, int N>
  __device__ __forceinline__ void load_part(float (&v)[N]) const {
    if (FIRST % 4 == 0 && STEP == 1 && !column) {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        float four[4];
        load<4>(&at(FIRST + i), four);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[i + k] = four[k];
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = at(FIRST + STEP * i);
    }
  }
  template <int FIRST, int STEP, int N>
  __device__ __forceinline__ void store_part(const float (&v)[N]) const {
    if (FIRST % 4 == 0 && STEP == 1 && !column) {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        float four[4] = {v[i], v[i + 1], v[i + 2], v[i + 3]};
        store<4>(&at(FIRST + i), four);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) at(FIRST + STEP * i) = v[i];
    }
  }
};

// A line of N values becomes S times it. The last step stores its results at once: N of them beside N values
// would not stay in registers.
template <int N>
__device__ __forceinline__ void dwt_synthesis(const Taps& t, const Line<N>& line) {
  float v[N];
  line.template load_part<0, 1>(v);
  dwt_synthesis<N, N / 2>(t, v);
#pragma unroll
  for (int k = 0; k < N / 2; k += 2) {
    int before = (k + N / 2 - 1) % (N / 2);
    float four[4];
    join(t, v[k], v[N / 2 + k], v[before], v[N / 2 + before], four[0], four[1]);
    join(t, v[k + 1], v[N / 2 + k + 1], v[k], v[N / 2 + k], four[2], four[3]);
    line.store_four(2 * k, four);
  }
}

// A line becomes S^T times it. The first step takes them from memory, as above.
template <int N>
__device__ __forceinline__ void dwt_transposed(const Taps& t, const Line<N>& line) {
  float v[N], x[4], next[4];
  line.load_four(0, x);
#pragma unroll
  for (int k = 0; k < N / 2; k += 2) {
    line.load_four((2 * k + 4) % N, next);
    v[k] = dot4(t.h, x[0], x[1], x[2], x[3]);
    v[N / 2 + k] = dot4(t.g, x[0], x[1], x[2], x[3]);
    v[k + 1] = dot4(t.h, x[2], x[3], next[0], next[1]);
    v[N / 2 + k + 1] = dot4(t.g, x[2], x[3], next[0], next[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = next[i];
  }
  dwt_transposed<N, N / 2>(t, v);
  line.template store_part<0, 1>(v);
}

// Threads that work on a line of B values: 64 values a thread.
template <int B>
constexpr int LINE_THREADS = B > 64 ? B / 64 : 1;

// What a line is to be multiplied by after a transform: some come out sqrt(B) times too large.
__device__ __forceinline__ float transform_factor(int transform, int block) {
  return transform == DCT || transform == HADAMARD ? rsqrtf(static_cast<float>(block)) : 1.0f;
}

// The Hadamard transform of a line of 2 H values by two threads; all threads of the block.
template <int H>
__device__ __forceinline__ void hadamard_halves(Line<2 * H> line, bool active, int part) {
  float v[H];
  float sign = part ? -1.0f : 1.0f;
  if (active) {
#pragma unroll
    for (int n = 0; n < H; ++n) v[n] = fmaf(sign, line.at(H + n), line.at(n));
    hadamard(v);
  }
  __syncthreads();
  if (active) {
#pragma unroll
    for (int n = 0; n < H; ++n) line.from(part * H).at(n) = v[n];
  }
  __syncthreads();
}

// The line becomes S line (up to transform_factor). Every thread of the block calls it; `part`, the same for a warp,
// tells the LINE_THREADS threads of a line apart; threads without a line are not `active`.
template <int B>
__device__ __forceinline__ void synthesise(int transform, Line<B> line, bool active, int part) {
  if constexpr (B <= 64) {
    if (active && transform != DCT && transform != HADAMARD) {
      dwt_synthesis(taps_of(transform), line);
    } else if (active) {
      float v[B];
      line.template load_part<0, 1>(v);
      if (transform == DCT) {
        dct_3(v);
      } else {
        hadamard(v);
      }
      line.template store_part<0, 1>(v);
    }
    __syncthreads();
  } else {
    constexpr int H = B / 2;
    float v[H];
    if (transform == DCT) {  // part 0 has the even coefficients, part 1 the odd ones
      __syncthreads();  // or the compiler reads the line ahead of the branch, into twice the registers
      if (active && part == 0) {
        line.template load_part<0, 2>(v);
        dct_3(v);
      } else if (active) {
        line.template load_part<1, 2>(v);
        dct_4(v);
      }
      __syncthreads();
      if (active && part == 1) line.template store_part<H, 1>(v);
      __syncthreads();
      if (active && part == 0) {
#pragma unroll
        for (int n = 0; n < H / 2; ++n) {
          float a = line.at(H + n), b = line.at(B - 1 - n);
          line.at(n) = v[n] + a;
          line.at(B - 1 - n) = v[n] - a;
          line.at(H - 1 - n) = v[H - 1 - n] + b;
          line.at(H + n) = v[H - 1 - n] - b;
        }
      }
      __syncthreads();
      return;
    }
    if (transform == HADAMARD) return hadamard_halves<H>(line, active, part);
    __syncthreads();  // as above
    Taps taps = taps_of(transform);
    if (active && part == 0) {
      line.template load_part<0, 1>(v);
      dwt_synthesis(taps, v);
      line.template store_part<0, 1>(v);
    }
    __syncthreads();
    int first = part * (H / 2), before = (first + H - 1) % H;
    if (active) {
      // By parts: of single elements sm_100 and sm_120 keep every address, a row's and a column's, from tile to tile.
      float a[H / 2], d[H / 2], a0 = line.at(before), d0 = line.at(H + before);
      line.from(first).template load_part<0, 1>(a);
      line.from(first).template load_part<H, 1>(d);
#pragma unroll
      for (int k = 0; k < H / 2; ++k) {
        join(taps, a[k], d[k], a0, d0, v[2 * k], v[2 * k + 1]);
        a0 = a[k];
        d0 = d[k];
      }
    }
    __syncthreads();
    if (active) line.from(2 * first).template store_part<0, 1>(v);
    __syncthreads();
  }
}

// The line becomes S^T line (up to transform_factor), as `synthesise`.
template <int B>
__device__ __forceinline__ void transpose_synthesis(int transform, Line<B> line, bool active, int part) {
  if constexpr (B <= 64) {
    if (active && transform != DCT && transform != HADAMARD) {
      dwt_transposed(taps_of(transform), line);
    } else if (active) {
      float v[B];
      line.template load_part<0, 1>(v);
      if (transform == DCT) {
        dct_2(v);
      } else {
        hadamard(v);
      }
      line.template store_part<0, 1>(v);
    }
    __syncthreads();
  } else {
    constexpr int H = B / 2;
    float v[H];
    if (transform == DCT) {  // part 0 makes the even coefficients, part 1 the odd ones
      __syncthreads();  // or the compiler reads the line ahead of the branch, into twice the registers
      if (active) {
        float sign = part ? -1.0f : 1.0f;
#pragma unroll
        for (int n = 0; n < H; ++n) v[n] = fmaf(sign, line.at(B - 1 - n), line.at(n));
        if (part == 0) {
          dct_2(v);
        } else {
          dct_4(v);
        }
      }
      __syncthreads();
      if (active) {
#pragma unroll
        for (int k = 0; k < H; ++k) line.at(2 * k + part) = v[k];
      }
      __syncthreads();
      return;
    }
    if (transform == HADAMARD) return hadamard_halves<H>(line, active, part);
    __syncthreads();  // as above
    Taps taps = taps_of(transform);
    int first = part * H;  // of the values; their coefficients are first / 2 ... of each half
    if (active) {
      Line<B> own = line.from(first), other = line.from(H - first);
      float x0 = own.at(0), x1 = own.at(1);
#pragma unroll
      for (int k = 0; k < H / 2; ++k) {
        bool last = k == H / 2 - 1;
        float x2 = last ? other.at(0) : own.at(2 * k + 2), x3 = last ? other.at(1) : own.at(2 * k + 3);
        v[k] = dot4(taps.h, x0, x1, x2, x3);
        v[H / 2 + k] = dot4(taps.g, x0, x1, x2, x3);
        x0 = x2;
        x1 = x3;
      }
    }
    __syncthreads();
    if (active) {
#pragma unroll
      for (int k = 0; k < H / 2; ++k) {
        line.from(first / 2).at(k) = v[k];
        line.from(first / 2).at(H + k) = v[H / 2 + k];
      }
    }
    __syncthreads();
    if (active && part == 0) {
      line.template load_part<0, 1>(v);
      dwt_transposed(taps, v);
      line.template store_part<0, 1>(v);
    }
    __syncthreads();
  }
}
