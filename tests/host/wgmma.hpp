// wgmma of wgmma.cuh on the host: executed at the wait, not where it is issued, so that a forgotten wait shows. Until then its
// sums are NaN. It reads shared memory as the async proxy sees it: what threads wrote by cp.async, once they have executed
// fence.proxy.async. Errors: operands that are not the same at the issue and at the wait; registers that a thread
// writes between its wgmma_fence and the issue, from their second wgmma on; warps of a warpgroup with different wgmmas.
// Included by device.hpp.
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

inline unsigned short bits_at(unsigned address, Where where) {
  size_t offset = size_t(address) - SHARED_BASE;
  if (address < SHARED_BASE || offset + 2 > dynamic_shared_bytes) {
    RBE_FAIL("wgmma in %s:%d reads address %u of shared memory, which has %zu bytes from %u on", where.file, where.line,
             address, dynamic_shared_bytes, SHARED_BASE);
  }
  unsigned short bits;
  if (async_shared.empty()) return 0xffff;  // NaN of both types
  memcpy(&bits, &async_shared[offset], 2);
  return bits;
}

// What the operands in shared memory hold, of this warp's 16 rows of a: FNV-1a.
inline uint64_t operands_of(const Wgmma& w, int warp) {
  uint64_t hash = 0xcbf2'9ce4'8422'2325ull;
  auto add = [&](const Matrix& m, int line, bool lines_run) {
    for (int k = 0; k < 16; ++k) hash = (hash ^ bits_at(place_of(m, line, k, lines_run), w.where)) * 0x100'0000'01b3ull;
  };
  if (!w.registers) {
    Matrix m = matrix_of(w.a, w.where);
    for (int r = 0; r < 16; ++r) add(m, warp % 4 * 16 + r, false);
  }
  Matrix m = matrix_of(w.b, w.where);
  for (int n = 0; n < w.columns; ++n) add(m, n, w.columns_run);
  return hash;
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
  if (operands_of(first, lanes[0]->id / LANES) != first.operands) {
    RBE_FAIL("thread %d: shared memory that the wgmma of %s:%d reads is written between its issue and the wait",
             lanes[0]->id, first.where.file, first.where.line);
  }
  std::vector<Wgmma>& of_group = warpgroup_wgmmas[lanes[0]->id / WARPGROUP];
  size_t nth = lanes[0]->wgmmas_done + index;
  if (nth == of_group.size()) of_group.push_back(first);
  const Wgmma& other = of_group[nth];
  if (!(other.where == first.where) || other.a != first.a || other.b != first.b || other.add != first.add ||
      other.group != first.group) {
    RBE_FAIL("thread %d: wgmma %zu is that of %s:%d, in other warps of the warpgroup %s:%d or of other operands",
             lanes[0]->id, nth, first.where.file, first.where.line, other.where.file, other.where.line);
  }
  float a[16][16];
  static float b[16][256];
  if (first.registers) {
    for (int i = 0; i < LANES; ++i) {
      const Wgmma& own = lanes[i]->wgmmas[index];
      if (memcmp(own.registers, own.words, sizeof own.words) != 0) {
        RBE_FAIL("thread %d: registers that the wgmma of %s:%d reads are written between its issue and the wait",
                 lanes[i]->id, own.where.file, own.where.line);
      }
      for (int r = 0; r < 4; ++r) {
        unsigned word = own.words[r];
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
      for (int k = 0; k < 16; ++k) a[r][k] = first.value(bits_at(place_of(m, row0 + r, k, false), first.where));
    }
  }
  Matrix m = matrix_of(first.b, first.where);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < first.columns; ++n) {
      b[k][n] = first.value(bits_at(place_of(m, n, k, first.columns_run), first.where));
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

// Registers of a wgmma about to be issued are those of the last wgmma_fence.
inline void require_fenced(Fiber& f, Where where, const void* at, size_t bytes) {
  for (const Fenced& known : f.fenced) {
    if (known.at != at) continue;
    if (memcmp(at, known.held.data(), bytes) != 0) {
      RBE_FAIL("thread %d: registers of the wgmma of %s:%d are written after the last wgmma_fence", f.id, where.file,
               where.line);
    }
    return;
  }
  const char* from = static_cast<const char*>(at);
  f.fenced.push_back({at, std::vector<char>(from, from + bytes)});
}

inline void issue_wgmma(Where where, float* sums, int columns, bool add, const unsigned* registers, uint64_t a, uint64_t b,
                        bool columns_run, float (*value)(unsigned short)) {
  Fiber& f = *block.current;
  if (!f.wgmma_fenced) {
    RBE_FAIL("thread %d issues the wgmma of %s:%d without a wgmma_fence since it waited", f.id, where.file, where.line);
  }
  Wgmma w{where, sums, columns, add, registers, {}, a, b, columns_run, value, f.wgmma_groups, 0};
  if (registers) {
    require_fenced(f, where, registers, sizeof w.words);
    memcpy(w.words, registers, sizeof w.words);
  }
  if (f.id % LANES == 0) w.operands = operands_of(w, f.id / LANES);
  f.wgmmas.push_back(w);
  for (const Sums& s : f.sums) {
    if (s.at == sums) return;
  }
  require_fenced(f, where, sums, columns / 2 * sizeof(float));
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
      lanes[i]->wgmmas_done += done;
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

inline void wgmma_fence() {
  rbe_host::Fiber& f = *rbe_host::block.current;
  f.wgmma_fenced = true;
  for (rbe_host::Fenced& known : f.fenced) memcpy(known.held.data(), known.at, known.held.size());
}
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
