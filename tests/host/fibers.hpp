// The threads of one block as fibers: each runs until it waits at a barrier, at a warp operation, or returns.
// Blocks run one after another. Warps, and the lanes within them, run in ascending or in descending order, so
// that a result that hangs on the order shows in one of the two.
//
// What a GPU leaves undefined is an error here: a barrier that some thread of the block does not reach, a
// barrier reached at two places of the source, a shuffle without all the lanes of its mask.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef __x86_64__
#include <xmmintrin.h>
#endif
#if defined(__x86_64__) && !defined(RBE_UCONTEXT)
#define RBE_SWITCH 1
#else
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace rbe_host {

constexpr int LANES = 32;
constexpr int WARPGROUP = 4 * LANES;
constexpr unsigned char POISON = 0xff;  // NaN in every float type, -1 in every integer

struct Where {
  const char* file;
  int line;
  bool operator==(const Where& o) const { return line == o.line && (file == o.file || !strcmp(file, o.file)); }
};

enum class State { NEW, RUNNING, BARRIER, WARP_OP, DONE };

struct Stack {
  char* low;
  size_t size;
};

struct Copy {  // one cp.async under way
  void* to;
  const void* from;  // null: zeros
};

struct Wgmma {  // one wgmma of a lane under way
  Where where;
  float* sums;  // d[2][columns / 8][2]
  int columns;
  bool add;
  const unsigned* registers;  // of a, or null where it is in shared memory
  unsigned words[4];          // what they hold at the issue
  uint64_t a, b;              // matrix descriptors
  bool columns_run;           // b: along the columns (N), otherwise along the sum (K)
  float (*value)(unsigned short);
  int group;
  uint64_t operands;  // of lane 0: a hash of what a and b hold in shared memory at the issue
};

// Registers of a thread that wgmma has read or written, as they were at its last wgmma_fence.
struct Fenced {
  const void* at;
  std::vector<char> held;
};

struct Sums {  // of a wgmma under way: what a thread reads meanwhile is NaN
  float* at;
  std::vector<float> held;
};

struct Fiber {
  State state;
  dim3 index;
  int id;
  Where where;        // of the wait
  unsigned mask;      // lanes of the warp operation
  void* operands;     // of the warp operation, on the fiber's stack
  Stack* stack;
  int copy_groups;                    // committed
  std::vector<std::pair<int, Copy>> copies;  // (group, copy), oldest first
  std::vector<void*> not_fenced;      // 16 bytes each that it wrote and no fence.proxy.async has followed
  int wgmma_groups;                   // committed
  bool wgmma_fenced;                  // since it last waited
  std::vector<Wgmma> wgmmas;          // oldest first
  std::vector<Sums> sums;
  std::vector<Fenced> fenced;
  size_t wgmmas_done;
#ifdef RBE_SWITCH
  void* sp;
#else
  ucontext_t context;
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake;
#endif
};

using Body = void (*)(void* const* args);

struct Block {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  dim3 block_index, block_dim, grid_dim;
  Body body = nullptr;
  void* const* args = nullptr;
  std::vector<Stack*> free_stacks;
  std::vector<Stack> all_stacks;
  bool failed = false;
  char message[1024];
#ifdef RBE_SWITCH
  void* sp;
#else
  ucontext_t context;
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake;
  const void* main_low;
  size_t main_size;
#endif
};

inline Block block;

// --- changing stacks ---------------------------------------------------------------------------------------

#ifdef RBE_SWITCH
// Saves the registers that a call preserves and the stack pointer, and takes up the other stack.
extern "C" void rbe_switch(void** save, void* resume) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden rbe_switch
.globl rbe_switch
.type rbe_switch, @function
rbe_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rbe_switch, .-rbe_switch
)");
#endif

inline Stack* take_stack() {
  if (!block.free_stacks.empty()) {
    Stack* s = block.free_stacks.back();
    block.free_stacks.pop_back();
    return s;
  }
#ifdef __SANITIZE_ADDRESS__
  constexpr size_t size = 512 << 10;
#else
  constexpr size_t size = 128 << 10;
#endif
  size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* low = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (low == MAP_FAILED || mprotect(low, page, PROT_NONE)) {
    perror("rbe_host: no memory for a fiber");
    abort();
  }
  if (block.all_stacks.capacity() < 1024) block.all_stacks.reserve(1024);  // pointers into it stay valid
  block.all_stacks.push_back({low, size});
  return &block.all_stacks.back();
}

inline void to_scheduler(bool last) {
  Fiber* f = block.current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &f->fake, block.main_low, block.main_size);
#endif
#ifdef RBE_SWITCH
  rbe_switch(&f->sp, block.sp);
#else
  swapcontext(&f->context, &block.context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(f->fake, nullptr, nullptr);
#endif
  (void)last;
}

inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block.main_low, &block.main_size);
#endif
  block.body(block.args);
  block.current->state = State::DONE;
  to_scheduler(true);
  abort();
}

inline void start(Fiber& f) {
  f.stack = take_stack();
  // Tops at different places of a page: 32 fibers whose frames share one cache set would evict each other.
  char* top = f.stack->low + f.stack->size - 64 * (f.id % 32) - 64;
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(f.stack->low + 4096, f.stack->size - 4096);
#endif
#ifdef RBE_SWITCH
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // fiber_main never returns; keeps its frame aligned as after a call
  *--sp = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  f.sp = sp;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack->low;
  f.context.uc_stack.ss_size = static_cast<size_t>(top - f.stack->low);
  f.context.uc_link = nullptr;
  makecontext(&f.context, reinterpret_cast<void (*)()>(&fiber_main), 0);
#endif
}

inline void resume(Fiber& f) {
  if (f.state == State::NEW) start(f);
  f.state = State::RUNNING;
  block.current = &f;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&block.fake, f.stack->low, f.stack->size);
#endif
#ifdef RBE_SWITCH
  rbe_switch(&block.sp, f.sp);
#else
  swapcontext(&block.context, &f.context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(block.fake, nullptr, nullptr);
#endif
  if (f.state == State::DONE) {
    block.free_stacks.push_back(f.stack);
    f.stack = nullptr;
  }
}

// --- errors ------------------------------------------------------------------------------------------------

inline void say(const char* format, ...) {
  if (block.failed) return;  // the first error counts
  block.failed = true;
  va_list list;
  va_start(list, format);
  size_t size = sizeof block.message;
  int n = snprintf(block.message, size, "block (%u, %u, %u): ", block.block_index.x, block.block_index.y,
                   block.block_index.z);
  vsnprintf(block.message + n, size - n, format, list);
  va_end(list);
}

// An error in the running thread: the launch ends.
#define RBE_FAIL(...)                   \
  do {                                  \
    rbe_host::say(__VA_ARGS__);         \
    rbe_host::to_scheduler(true);       \
    abort();                            \
  } while (0)

inline const char* describe(const Fiber& f, char (&text)[256]) {
  const char* what = f.state == State::BARRIER ? "waits at the barrier"
                     : f.state == State::WARP_OP ? "waits at the warp operation"
                                                 : "has returned";
  if (f.state == State::DONE) {
    snprintf(text, sizeof text, "thread %d %s", f.id, what);
  } else {
    snprintf(text, sizeof text, "thread %d %s of %s:%d", f.id, what, f.where.file, f.where.line);
  }
  return text;
}

// No thread can go on, and they do not all wait at one barrier.
inline void report_deadlock() {
  const Fiber* waits = nullptr;
  for (const Fiber& f : block.fibers) {
    if (f.state != State::DONE) {
      waits = &f;
      if (f.state == State::WARP_OP) break;
    }
  }
  const Fiber* other = nullptr;
  for (const Fiber& f : block.fibers) {
    bool in_warp = waits->state != State::WARP_OP ||
                   (f.id / LANES == waits->id / LANES && waits->mask >> f.id % LANES & 1);
    bool same = f.state == waits->state && f.where == waits->where && f.mask == waits->mask;
    if (in_warp && !same) {
      other = &f;
      break;
    }
  }
  char a[256], b[256];
  if (other == nullptr) {  // only a lane that the block does not have can be missing
    say("%s with mask 0x%08x, which names lanes that the block of %zu threads does not have",
        describe(*waits, a), waits->mask, block.fibers.size());
  } else {
    say("%s, but %s", describe(*waits, a), describe(*other, b));
  }
}

// --- what threads wait for ---------------------------------------------------------------------------------

inline void barrier(Where where) {
  Fiber* f = block.current;
  f->state = State::BARRIER;
  f->where = where;
  f->mask = 0;
  to_scheduler(false);
}

// An operation of the lanes of `mask` together. Each brings `operands`; the last to arrive calls
// run(operands of all lanes, mask), which leaves the results in them.
template <class Run>
inline void warp_operation(Where where, unsigned mask, void* operands, Run run) {
  Fiber* f = block.current;
  int lane = f->id % LANES;
  if (!(mask >> lane & 1)) {
    RBE_FAIL("thread %d is not in the mask 0x%08x of its warp operation of %s:%d", f->id, mask, where.file,
             where.line);
  }
  f->state = State::WARP_OP;
  f->where = where;
  f->mask = mask;
  f->operands = operands;
  Fiber* warp = f - lane;
  int lanes = static_cast<int>(block.fibers.size()) - (f->id - lane);
  if (lanes > LANES) lanes = LANES;
  void* all[LANES] = {};
  bool complete = lanes == LANES || mask >> lanes == 0;
  for (int i = 0; complete && i < lanes; ++i) {
    if (mask >> i & 1) {
      const Fiber& o = warp[i];
      complete = o.state == State::WARP_OP && o.mask == mask && o.where == where;
      all[i] = o.operands;
    }
  }
  if (!complete) {
    to_scheduler(false);
    return;
  }
  run(all, mask);
  for (int i = 0; i < lanes; ++i) {
    if (mask >> i & 1) warp[i].state = State::RUNNING;
  }
}

// --- shared memory -----------------------------------------------------------------------------------------

extern "C" char __start_rbe_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_rbe_shared[] __attribute__((weak, visibility("hidden")));

constexpr size_t CANARY = 64;
inline char* dynamic_shared = nullptr;
inline size_t dynamic_shared_bytes = 0;
inline std::vector<std::vector<Wgmma>> warpgroup_wgmmas;  // of each: what the first of its warps there has executed
inline std::vector<char> async_shared;  // the same memory as wgmma sees it; empty before the first fence.proxy.async

inline bool is_shared(const void* p, size_t bytes) {
  const char* c = static_cast<const char*>(p);
  return (c >= __start_rbe_shared && c + bytes <= __stop_rbe_shared) ||
         (c >= dynamic_shared && c + bytes <= dynamic_shared + dynamic_shared_bytes);
}

__attribute__((no_sanitize_address, noinline)) inline void poison_shared() {
  for (volatile char* p = __start_rbe_shared; p != __stop_rbe_shared; ++p) *p = static_cast<char>(POISON);
  for (size_t i = 0; i < dynamic_shared_bytes; ++i) dynamic_shared[i] = static_cast<char>(POISON);
}

inline void check_canary() {
#ifndef __SANITIZE_ADDRESS__
  for (size_t i = 0; i < CANARY; ++i) {
    if (dynamic_shared[dynamic_shared_bytes + i] != 0x5a) {
      say("a thread wrote %zu bytes past the end of the %zu bytes of dynamic shared memory", i,
          dynamic_shared_bytes);
      return;
    }
  }
#endif
}

// All four warps of a warpgroup execute the same wgmmas.
inline void check_warpgroups() {
  for (const Fiber& f : block.fibers) {
    size_t wgmmas = warpgroup_wgmmas[f.id / WARPGROUP].size();
    if (f.wgmmas_done != wgmmas || !f.wgmmas.empty()) {
      say("thread %d executes %zu wgmmas and waits for %zu of them; the warpgroup executes %zu", f.id,
          f.wgmmas_done + f.wgmmas.size(), f.wgmmas_done, wgmmas);
      return;
    }
  }
}

// --- arithmetic: subnormal floats are zero, as under the -ftz=true of CuPy ----------------------------------

#if defined(__x86_64__)
constexpr uint64_t SUBNORMALS_ARE_ZERO = 0x8040;  // of results and of operands
inline uint64_t arithmetic_mode() { return _mm_getcsr(); }
inline void set_arithmetic_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
constexpr uint64_t SUBNORMALS_ARE_ZERO = 1 << 24;
inline uint64_t arithmetic_mode() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_arithmetic_mode(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode)); }
#else
#error "the host build knows x86-64 and AArch64"
#endif

// --- one launch --------------------------------------------------------------------------------------------

inline void run_block(bool reverse) {
  int count = static_cast<int>(block.fibers.size());
  int warps = (count + LANES - 1) / LANES;
  for (Fiber& f : block.fibers) {
    f.state = State::NEW;
    f.mask = 0;
    f.copy_groups = 0;
    f.copies.clear();
    f.not_fenced.clear();
    f.wgmma_groups = 0;
    f.wgmma_fenced = false;
    f.wgmmas.clear();
    f.sums.clear();
    f.fenced.clear();
    f.wgmmas_done = 0;
  }
  async_shared.clear();
  warpgroup_wgmmas.assign((count + WARPGROUP - 1) / WARPGROUP, {});
  poison_shared();
  for (;;) {
    for (int w = 0; w < warps; ++w) {
      int warp = reverse ? warps - 1 - w : w;
      int lanes = count - warp * LANES < LANES ? count - warp * LANES : LANES;
      for (bool moved = true; moved;) {
        moved = false;
        for (int l = 0; l < lanes; ++l) {
          Fiber& f = block.fibers[warp * LANES + (reverse ? lanes - 1 - l : l)];
          if (f.state == State::NEW || f.state == State::RUNNING) {
            resume(f);
            moved = true;
            if (block.failed) return;
          }
        }
      }
    }
    const Fiber& first = block.fibers[0];
    bool all_done = true, all_wait = first.state == State::BARRIER;
    for (const Fiber& f : block.fibers) {
      all_done = all_done && f.state == State::DONE;
      all_wait = all_wait && f.state == State::BARRIER && f.where == first.where;
    }
    if (all_done) {
      check_warpgroups();
      return check_canary();
    }
    if (!all_wait) return report_deadlock();
    for (Fiber& f : block.fibers) f.state = State::RUNNING;
  }
}

// Null, or what went wrong.
inline const char* launch(Body body, void* const* args, const unsigned* grid, const unsigned* dim, size_t shared,
                          bool reverse) {
  block.body = body;
  block.args = args;
  block.failed = false;
  block.grid_dim = {grid[0], grid[1], grid[2]};
  block.block_dim = {dim[0], dim[1], dim[2]};
  block.fibers.resize(size_t(dim[0]) * dim[1] * dim[2]);
  for (size_t i = 0; i < block.fibers.size(); ++i) {
    unsigned id = static_cast<unsigned>(i);
    block.fibers[i].id = static_cast<int>(i);
    block.fibers[i].index = {id % dim[0], id / dim[0] % dim[1], id / dim[0] / dim[1]};
  }
#ifdef __SANITIZE_ADDRESS__
  size_t room = shared;
#else
  size_t room = shared + CANARY;
#endif
  dynamic_shared = static_cast<char*>(aligned_alloc(64, (room + 63) / 64 * 64 + 64));
  dynamic_shared_bytes = shared;
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(dynamic_shared + shared, (room + 63) / 64 * 64 + 64 - shared);
#else
  memset(dynamic_shared + shared, 0x5a, CANARY);
#endif
  uint64_t mode = arithmetic_mode();
  set_arithmetic_mode(mode | SUBNORMALS_ARE_ZERO);
  unsigned blocks = grid[0] * grid[1] * grid[2];
  for (unsigned i = 0; i < blocks && !block.failed; ++i) {
    unsigned b = reverse ? blocks - 1 - i : i;
    block.block_index = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
    run_block(reverse);
  }
  set_arithmetic_mode(mode);
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(dynamic_shared, (room + 63) / 64 * 64 + 64);
#endif
  free(dynamic_shared);
  dynamic_shared = nullptr;
  dynamic_shared_bytes = 0;
  if (block.failed) {  // stacks of threads that did not finish
    for (Fiber& f : block.fibers) {
      if (f.stack) block.free_stacks.push_back(f.stack);
      f.stack = nullptr;
    }
  }
  return block.failed ? block.message : nullptr;
}

}  // namespace rbe_host
