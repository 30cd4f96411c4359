// wgmma of wgmma.cuh on the host: executed at the wait, not where it is issued, so that a forgotten wait shows, and so does
// an operand that is written meanwhile. Until then its sums are NaN. It reads shared memory as the async proxy sees it:
// what threads wrote by cp.async, once they have executed fence.proxy.async. Included by device.hpp.
//
// Layouts are those of the PTX ISA (9.7.15.5.1, "Register fragments and shared memory matrix layouts").
#pragma once

namespace rbe_host {

// Dynamic shared memory begins here, and no tile may hope for more than 16 bytes of alignment.
constexpr unsigned SHARED_BASE = 1024 + 16;

// A matrix descriptor. Distances in bytes; swizzle: bytes of a row of its pattern, 16 for none.
struct Matrix {
  unsigned start, leading, stride, swizzle;
};

inline Matrix matrix_of(uint64_t descriptor, Where where) {
  constexpr uint64_t KNOWN = 0xc000'3fff'3fff'3fffull;  // base offset 0: patterns begin at multiples of their size
  if (descriptor & ~KNOWN) {
    RBE_FAIL("wgmma in %s:%d: the descriptor 0x%016llx has bits beside the start, both distances and the swizzle",
             where.file, where.line, static_cast<unsigned long long>(descriptor));
  }
  auto field = [descriptor](int bit) { return static_cast<unsigned>(descriptor >> bit & 0x3fff) << 4; };
  constexpr unsigned SWIZZLE[] = {16, 128, 64, 32};
  return {field(0), field(16), field(32), SWIZZLE[descriptor >> 62]};
}

// Address of element (line, k) of halves: `line` counts rows of a or columns of b, k runs along the sum. lines_run: lines lie
// side by side in a row of the pattern (MN-major), otherwise values of k do (K-major).
inline unsigned place_of(const Matrix& m, int line, int k, bool lines_run) {
  int row = lines_run ? k : line, column = lines_run ? line : k;  // of the pattern, 8 rows high
  int width = static_cast<int>(m.swizzle / 2);
  unsigned at = m.start + row % 8 * m.swizzle + column % width * 2;
  if (m.swizzle == 16 && lines_run) {
    at += row / 8 * m.leading + column / width * m.stride;
  } else {
    at += row / 8 * m.stride + column / width * (m.swizzle == 16 || lines_run ? m.leading : m.swizzle);
  }
  return at ^ (at >> 7 & (m.swizzle / 16 - 1)) << 4;
}

inline float half_at(unsigned address, float (*value)(unsigned short), Where where) {
  size_t offset = size_t(address) - SHARED_BASE;
  if (address < SHARED_BASE || offset + 2 > dynamic_shared_bytes) {
    RBE_FAIL("wgmma in %s:%d reads address %u of shared memory, which has %zu bytes from %u on", where.file, where.line,
             address, dynamic_shared_bytes, SHARED_BASE);
  }
  unsigned short bits;
  if (async_shared.empty()) return NAN;
  memcpy(&bits, &async_shared[offset], 2);
  return value(bits);
}

// Of f16 or bf16, which types.cuh declares behind this file.
template <class T>
float value_of(unsigned short bits) {
  return to_float(T{bits});
}

inline Sums& sums_of(Fiber& f, float* at) {
  for (Sums& s : f.sums) {
    if (s.at == at) return s;
  }
  abort();
}

// One wgmma of a warp: its 16 rows of the 64.
inline void multiply_warp(Fiber* const* lanes, size_t index) {
  const Wgmma& first = lanes[0]->wgmmas[index];
  for (int i = 0; i < LANES; ++i) {
    const Wgmma& o = lanes[i]->wgmmas[index];
    if (!(o.where == first.where) || o.a != first.a || o.b != first.b || o.add != first.add) {
      RBE_FAIL("thread %d: wgmma in %s:%d has other operands than in thread %d", lanes[i]->id, o.where.file,
               o.where.line, lanes[0]->id);
    }
  }
  float a[16][16];
  static float b[16][256];
  if (first.registers) {
    for (int i = 0; i < LANES; ++i) {
      for (int r = 0; r < 4; ++r) {
        unsigned word = lanes[i]->wgmmas[index].registers[r];
        for (int half = 0; half < 2; ++half) {
          a[i / 4 + 8 * (r % 2)][2 * (i % 4) + 8 * (r / 2) + half] =
              first.value(static_cast<unsigned short>(word >> 16 * half));
        }
      }
    }
  } else {
    Matrix m = matrix_of(first.a, first.where);
    int row0 = lanes[0]->id / LANES % 4 * 16;
    for (int r = 0; r < 16; ++r) {
      for (int k = 0; k < 16; ++k) a[r][k] = half_at(place_of(m, row0 + r, k, false), first.value, first.where);
    }
  }
  Matrix m = matrix_of(first.b, first.where);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < first.columns; ++n) {
      b[k][n] = half_at(place_of(m, n, k, first.columns_run), first.value, first.where);
    }
  }
  for (int i = 0; i < LANES; ++i) {
    std::vector<float>& held = sums_of(*lanes[i], lanes[i]->wgmmas[index].sums).held;
    for (int e = 0; e < first.columns / 2; ++e) {  // e of d[r][n][c]
      int r = e / (first.columns / 4), n = e / 2 % (first.columns / 8), c = e % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[8 * r + i / 4][k] * b[k][8 * n + 2 * (i % 4) + c];
      held[e] = first.add ? held[e] + sum : sum;
    }
  }
}

inline void issue_wgmma(Where where, float* sums, int columns, bool add, const unsigned* registers, uint64_t a, uint64_t b,
                        bool columns_run, float (*value)(unsigned short)) {
  Fiber& f = *block.current;
  if (!f.wgmma_fenced) {
    RBE_FAIL("thread %d issues the wgmma of %s:%d without a wgmma_fence since it waited", f.id, where.file, where.line);
  }
  f.wgmmas.push_back({where, sums, columns, add, registers, a, b, columns_run, value, f.wgmma_groups});
  for (const Sums& s : f.sums) {
    if (s.at == sums) return;
  }
  f.sums.push_back({sums, std::vector<float>(sums, sums + columns / 2)});
  std::fill(sums, sums + columns / 2, NAN);
}

// Executes the groups but for the last `left` committed.
inline void wait_wgmma(Where where, int left) {
  Fiber* f = block.current;
  warp_operation(where, 0xffffffffu, f, [left, where](void** operands, unsigned) {
    Fiber* const* lanes = reinterpret_cast<Fiber**>(operands);
    size_t done = 0;
    while (done < lanes[0]->wgmmas.size() && lanes[0]->wgmmas[done].group < lanes[0]->wgmma_groups - left) ++done;
    for (int i = 0; i < LANES; ++i) {
      if (lanes[i]->wgmmas.size() != lanes[0]->wgmmas.size()) {
        RBE_FAIL("thread %d: %zu wgmmas are under way in %s:%d, in thread %d %zu", lanes[i]->id, lanes[i]->wgmmas.size(),
                 where.file, where.line, lanes[0]->id, lanes[0]->wgmmas.size());
      }
    }
    for (size_t k = 0; k < done; ++k) multiply_warp(lanes, k);
    for (int i = 0; i < LANES; ++i) {
      std::vector<Wgmma>& wgmmas = lanes[i]->wgmmas;
      wgmmas.erase(wgmmas.begin(), wgmmas.begin() + static_cast<long>(done));
      std::vector<Sums>& sums = lanes[i]->sums;
      for (size_t s = sums.size(); s-- > 0;) {
        bool used = false;
        for (const Wgmma& w : wgmmas) used = used || w.sums == sums[s].at;
        if (used) continue;
        std::copy(sums[s].held.begin(), sums[s].held.end(), sums[s].at);
        sums.erase(sums.begin() + static_cast<long>(s));
      }
    }
  });
  f->wgmma_fenced = false;
}

}  // namespace rbe_host

inline unsigned shared_address(const void* p) {
  return rbe_host::SHARED_BASE + static_cast<unsigned>(static_cast<const char*>(p) - rbe_host::dynamic_shared);
}

inline void fence_proxy_async() {
  using namespace rbe_host;
  if (async_shared.empty()) async_shared.assign(dynamic_shared_bytes, static_cast<char>(POISON));
  for (void* written : block.current->not_fenced) {
    memcpy(&async_shared[static_cast<char*>(written) - dynamic_shared], written, 16);
  }
  block.current->not_fenced.clear();
}

inline void wgmma_fence() { rbe_host::block.current->wgmma_fenced = true; }
inline void wgmma_commit() { ++rbe_host::block.current->wgmma_groups; }

template <int GROUPS>
void wgmma_wait(RBE_HERE) {
  rbe_host::wait_wgmma({file, line}, GROUPS);
}

template <class Registers>
void settled(Registers&) {}

template <class T, int N>
void wgmma_rows(float (&d)[2][N][2], unsigned long long a, unsigned long long b, bool add, RBE_HERE) {
  rbe_host::issue_wgmma({file, line}, &d[0][0][0], 8 * N, add, nullptr, a, b, false, &rbe_host::value_of<T>);
}
template <class T, int N>
void wgmma_columns(float (&d)[2][N][2], const unsigned (&a)[4], unsigned long long b, RBE_HERE) {
  rbe_host::issue_wgmma({file, line}, &d[0][0][0], 8 * N, true, a, 0, b, true, &rbe_host::value_of<T>);
}
