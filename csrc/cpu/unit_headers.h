// What unit_body.h uses of shared code. A translation unit for a wide instruction set includes this
// before it switches the target: inline functions are then compiled for every processor, whichever
// copy of them the linker keeps.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "fold_state.h"
#include "numeric.h"
#include "plan_view.h"
#include "scratch.h"
#include "softmax_state.h"
#include "tile_reader.h"
#include "unit.h"
