/* body.h: the kernels of one (instruction set, number format): a table of contents.

   instances.h includes it once per format and says which; the file of the instruction set has said its
   own.  Everything is static and named by F; the table at the end is all that is seen outside. */

#include "simd.h"         /* the vector type and its operations */
#include "activations.h"  /* sigmoid and tanh on vectors */
#include "tile.h"         /* the register tile of the format: format_float.h, ..._bfloat16.h, ..._int8.h */
#include "panels.h"       /* packed operands, and a group of rows over a panel */
#include "products.h"     /* gemm, the gradients of weights */
#include "cell_lstm.h"    /* a cell each: its equations, and its steps through step.h */
#include "cell_varied.h"
#if !BELOW
#include "cell_norm.h"
#include "cell_norm_gates.h"
#endif
#include "cell_rnn.h"
#include "cell_gru.h"
#if !BELOW
#include "loss.h"
#include "optimizer.h"
#endif

#if TRAINS
#define TRAINED(function) F(function)
#else
#define TRAINED(function) NULL
#endif

static const lstm_cell F(cells)[] = {
    {.name = "lstm", .gates = 4, .keeps_gates = 1, .has_c = 1, .step = F(lstm_step),
     .back_step = TRAINED(lstm_back_step), .output = F(lstm_output),
     .peephole_gradient = F(peephole_gradient)},
    {.name = "lstm_varied", .gates = 4, .keeps_gates = 1, .has_c = 1, .reads_h = 1, .varies = 1,
     .step = F(varied_step), .back_step = TRAINED(varied_back_step),
     .peephole_gradient = F(peephole_gradient)},
#if !BELOW
    {.name = "lstm_norm", .gates = 4, .keeps_gates = 1, .has_c = 1, .norm_step = F(norm_step),
     .norm_back_step = F(norm_back_step), .norm_gradient = F(norm_gradient),
     .norm_inputs = F(norm_inputs), .norms = 10, .moments = 6},
    {.name = "lstm_norm_gates", .gates = 4, .keeps_gates = 1, .has_c = 1, .norm_step = F(norm_gates_step),
     .norm_back_step = F(norm_gates_back_step), .norm_gradient = F(norm_gates_gradient), .norms = 6,
     .moments = 10, .keeps_raw = 1},
#endif
    {.name = "tanh", .gates = 1, .step = F(tanh_step), .back_step = TRAINED(tanh_back_step)},
    {.name = "relu", .gates = 1, .step = F(relu_step), .back_step = TRAINED(relu_back_step)},
    {.name = "gru", .gates = 4, .apart = 1, .keeps_gates = 1, .reads_h = 1, .step = F(gru_step),
     .back_step = TRAINED(gru_back_step)},
    {.name = "gru_before", .gates = 3, .later = 1, .keeps_gates = 1, .reads_h = 1,
     .step = F(gru_before_step), .back_step = TRAINED(gru_before_back_step),
     .later_step = F(gru_later_step), .later_back_step = TRAINED(gru_later_back_step)},
    {.name = NULL},
};

#define NAME_(isa) #isa
#define NAME(isa) NAME_(isa)

enum { F(lanes_of_vector) = VECTOR_BYTES / sizeof(R), F(rows_of_tile) = MR };
#undef VL  /* fields of the table have these names */
#undef MR
#undef AT_ONCE

static const lstm_kernels F(kernels) = {
    .isa = NAME(ISA),
    .format = FORMAT,
    .item = sizeof(R),
    .packed = sizeof(PACKED) / PACKED_NUMBERS,
    .VL = F(lanes_of_vector),
    .MR = F(rows_of_tile),
    .cells = F(cells),
    .vector_bytes = F(vector_bytes),
#if LOWERS
    .lowered_bytes = F(lowered_bytes),
    .lower = F(lower),
#endif
    .pack = F(pack),
    .gemm = F(gemm),
    .weight_gradient = TRAINED(weight_gradient),
    .weight_gradient_work = TRAINED(weight_gradient_work),
    .add_rows = TRAINED(add_rows),
#if !BELOW
    .cross_entropy = F(cross_entropy),
    .adam = F(adam),
#endif
    .sigmoid = F(array_sigmoid),
    .tanh = F(array_tanh),
};

#undef TRAINED
#undef NAME_
#undef NAME
#undef LEFT
#undef LEFT_OF
#undef WHOLE
#undef BLOCK
#undef AT
#undef NEIGHBORS
#undef AMX_AT
#undef HEAD
#undef ROWS
#undef TILES_BEGIN
#undef TILES_END
#undef DOT
#undef BY_TILES
#undef IN_ORDER
#undef JOINS
#undef STAYS
#undef PACKED
#undef PACKED_NUMBERS
#undef STEP
#undef KC
#undef ZERO
#undef LOWERS
#undef TRAINS
#undef TILE_MODE_BEGIN
#undef TILE_MODE_END
