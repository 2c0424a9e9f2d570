// Tiles of AMX: 16 rows of signed bytes times 16 outputs of unsigned ones, a whole product of 32 or 64 inputs at a time.
// Sums of bytes are whole numbers, so it changes no bit of a result which unit adds them up.
#pragma once

#include <cstdint>

#if defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__linux__) && defined(__x86_64__)
#define MILLSTREAM_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tiles {

constexpr int HEIGHT = 16;

#if MILLSTREAM_TILES

// A process asks its kernel once, for all of its threads.
inline bool allowed() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool yes = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return yes;
}

// Tiles 0 to 3 hold factors, 4 to 7 sums. NARROW: 0 and 2 are rows of 32 bytes, 1 and 3 the codes for them. WHOLE: 0 and 1
// are rows of 64 bytes, 2 and 3 the codes.
enum Shape { NONE, NARROW, WHOLE };

inline Shape &shape() {
  static thread_local Shape held = NONE;
  return held;
}

inline void take(Shape wanted) {
  if (shape() == wanted) return;
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } layout;
  for (int t = 0; t < 8; t++) layout.rows[t] = HEIGHT, layout.bytes[t] = 64;
  if (wanted == NARROW) layout.bytes[0] = layout.bytes[2] = 32, layout.rows[1] = layout.rows[3] = 8;
  _tile_loadconfig(&layout);
  shape() = wanted;
}

// While one lives, its thread may `take` tiles. Other code of the process may use them before and after.
class Scope {
public:
  Scope() { on() = allowed(); }
  ~Scope() {
    if (shape() != NONE) _tile_release();
    shape() = NONE, on() = false;
  }
  Scope(const Scope &) = delete;
  static bool &on() {
    static thread_local bool may = false;
    return may;
  }
};

#else

struct Scope {
  Scope() {}
  ~Scope() {}
};

#endif

} // namespace tiles
