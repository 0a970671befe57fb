/* body.h: the kernels of one (instruction set, number format): a table of contents.

   instances.h includes it once per format and says which; the file of the instruction set has said its
   own.  Everything is static and named by F; the table at the end is all that is seen outside. */

#include "simd.h"         /* the vector type and its operations */
#include "activations.h"  /* sigmoid and tanh on vectors */
#include "tile.h"         /* the register tile */
#include "panels.h"       /* packed operands, and a group of rows over a panel */
#include "products.h"     /* gemm, the gradients of weights, sums of rows */
#include "cell_lstm.h"    /* a cell each: its equations, and its steps through step.h */
#include "cell_rnn.h"
#include "cell_gru.h"
#include "loss.h"
#include "optimizer.h"

static const lstm_cell F(cells)[] = {
    {.name = "lstm", .gates = 4, .keeps_gates = 1, .has_c = 1, .step = F(lstm_step),
     .back_step = F(lstm_back_step), .output = F(lstm_output),
     .peephole_gradient = F(peephole_gradient)},
    {.name = "tanh", .gates = 1, .step = F(tanh_step), .back_step = F(tanh_back_step)},
    {.name = "relu", .gates = 1, .step = F(relu_step), .back_step = F(relu_back_step)},
    {.name = "gru", .gates = 4, .apart = 1, .keeps_gates = 1, .reads_h = 1, .step = F(gru_step),
     .back_step = F(gru_back_step)},
    {.name = NULL},
};

#define NAME_(isa) #isa
#define NAME(isa) NAME_(isa)

enum { F(lanes_of_vector) = VECTOR_BYTES / sizeof(R), F(rows_of_tile) = MR };
#undef VL  /* fields of the table have these names */
#undef MR

static const lstm_kernels F(kernels) = {
    .isa = NAME(ISA),
    .format = FORMAT,
    .item = sizeof(R),
    .packed = sizeof(PACKED),
    .VL = F(lanes_of_vector),
    .MR = F(rows_of_tile),
    .cells = F(cells),
    .pack = F(pack),
    .gemm = F(gemm),
    .weight_gradient = F(weight_gradient),
    .weight_gradient_work = F(weight_gradient_work),
    .add_rows = F(add_rows),
    .cross_entropy = F(cross_entropy),
    .adam = F(adam),
    .sigmoid = F(array_sigmoid),
    .tanh = F(array_tanh),
};
