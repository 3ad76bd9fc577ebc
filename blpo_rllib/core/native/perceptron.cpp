// Passes of a multi-layer perceptron over the slots of a minibatch, for CPUs. What each computes, and its symbols, are
// defined in blpo_rllib/core/mlp.py; the same in torch operations stands there and is what the tests compare with.
//
// Arrays stand unit by unit, [d, N], with N slots: the n of the minibatch, padded to whole vectors. Whatever the
// padding holds, cotangents are 0 there. One tile of slots goes through all layers while it is in the cache; gradients,
// which sum over slots, are shared out by units instead. Results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "functions.h"
#include "vectors.h"

namespace {

// Accumulators of a register tile: 24 and 16 of the 32 vector registers of AVX-512 and NEON, 12 and 8 of AVX's 16.
constexpr bool kManyRegisters = kVectorBytes != 32;
constexpr int kUnits = kManyRegisters ? 8 : 4;    // product: units ...
constexpr int kVectors = 3;                       // ... by vectors of slots
constexpr int kRows = kManyRegisters ? 8 : 4;     // gradient: units of layer l ...
constexpr int kColumns = 2;                       // ... by vectors of units of layer l - 1
constexpr int kGroup = 16;                        // units of layer l that one thread takes at a time
constexpr int64_t kChunk = 128;                   // slots summed over before the next units: what the L1 cache holds
// Inputs beyond whole vectors, and units of a layer, so few that its gradient takes less time as sums along slots than
// by vectors of inputs, most of whose lanes would be empty, or for which the inputs would first have to be turned.
constexpr int64_t kFewInputs = 6, kFewUnits = 4;

// Swaps the blocks of D lanes that stand crosswise in two rows.
template <class T, int D, int... L>
inline void swap_blocks(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, L...>) {
  constexpr int n = kLanes<T>;
  const Vector<T> upper = __builtin_shufflevector(a, b, ((L & D) ? n + (L ^ D) : L)...);
  b = __builtin_shufflevector(a, b, ((L & D) ? n + L : (L ^ D))...);
  a = upper;
}
// Transposes a square of lanes x lanes numbers.
template <class T, int D = kLanes<T> / 2>
inline void transpose(Vector<T> (&x)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i)
    if (!(i & D)) swap_blocks<T, D>(x[i], x[i + D], std::make_integer_sequence<int, kLanes<T>>());
  if constexpr (D > 1) transpose<T, D / 2>(x);
}
enum Activation : int64_t { kTanh = 0, kRelu = 1 };

template <class V>
inline V activate(Activation kind, V z) {
  if (kind == kTanh) return tanh_of(z);
  return z > 0 ? z : (z != z ? z : V{});  // keeps NaN, as torch.relu does
}
// phi'(z) from h = phi(z).
template <class V>
inline V slope(Activation kind, V h) {
  return kind == kTanh ? 1 - h * h : (h > 0 ? V{} + 1 : V{});
}
// phi''/phi' from h.
template <class V>
inline V curvature_ratio(Activation kind, V h) {
  return kind == kTanh ? -2 * h : V{};
}

template <class T>
struct Net {
  int64_t depth;                  // L
  const int64_t* sizes;           // d_0 ... d_L
  const int64_t* activations;     // of layers 1 ... L - 1
  const T* const* parameters;     // W_1, b_1, ..., W_L, b_L
  int64_t slots;                  // N

  const T* weight(int64_t layer) const { return parameters[2 * (layer - 1)]; }
  const T* bias(int64_t layer) const { return parameters[2 * (layer - 1) + 1]; }
  Activation activation(int64_t layer) const { return static_cast<Activation>(activations[layer - 1]); }
  // Where layer l stands in an array of the layers from `first` on, unit by unit.
  int64_t offset(int64_t layer, int64_t first) const {
    int64_t units = 0;
    for (int64_t l = first; l < layer; ++l) units += sizes[l];
    return units * slots;
  }
  // Whether h_l is needed slot by slot, for the gradient of layer l + 1.
  bool is_turned(int64_t layer) const { return sizes[layer + 1] > kFewUnits && sizes[layer] > kFewInputs; }
  // Units of layer l in whole vectors, and where it stands in an array of layers slot by slot, [N, units in vectors].
  int64_t width(int64_t layer) const { return (sizes[layer] + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
  int64_t offset_by_slot(int64_t layer, int64_t first) const {
    int64_t units = 0;
    for (int64_t l = first; l < layer; ++l) units += width(l);
    return units * slots;
  }
  int64_t num_parameters() const {
    int64_t count = 0;
    for (int64_t l = 1; l <= depth; ++l) count += sizes[l] * (sizes[l - 1] + 1);
    return count;
  }
  int64_t num_tiles() const { return (slots / kLanes<T> + kVectors - 1) / kVectors; }
};

// acc[r][v] = sum_k a(r, k) b[k, v]: R units on V vectors of slots; a(r, k) = a[r * row + k * column].
template <class T, int R, int V>
inline void accumulate(const T* a, int64_t row, int64_t column, const T* b, int64_t slots, int64_t depth,
                       Vector<T> (&acc)[R][V]) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = Vector<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = load<T>(b + k * slots + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T weight = a[r * row + k * column];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[r][v] += weight * x[v];
    }
  }
}

template <class T, int R, int V, class Done>
inline void units_of_product(const T* a, int64_t row, int64_t column, const T* b, int64_t slots, int64_t depth,
                             int64_t first, const Done& done) {
  Vector<T> acc[R][V];
  accumulate<T, R, V>(a + first * row, row, column, b, slots, depth, acc);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) done(first + r, v * kLanes<T>, acc[r][v]);
}

template <class T, int V, class Done>
inline void tile_of_product(const T* a, int64_t row, int64_t column, const T* b, int64_t slots, int64_t units,
                            int64_t depth, const Done& done) {
  int64_t r = 0;
  for (; r + kUnits <= units; r += kUnits)
    units_of_product<T, kUnits, V>(a, row, column, b, slots, depth, r, done);
  for (; r + 2 <= units; r += 2) units_of_product<T, 2, V>(a, row, column, b, slots, depth, r, done);
  if (r < units) units_of_product<T, 1, V>(a, row, column, b, slots, depth, r, done);
}

// done(unit, slot, sum over k of a(unit, k) b[k, slot ...]) for all units and `vectors` vectors of slots.
template <class T, class Done>
inline void product(const T* a, int64_t row, int64_t column, const T* b, int64_t slots, int64_t units, int64_t depth,
                    int vectors, const Done& done) {
  if (vectors == 3) tile_of_product<T, 3>(a, row, column, b, slots, units, depth, done);
  if (vectors == 2) tile_of_product<T, 2>(a, row, column, b, slots, units, depth, done);
  if (vectors == 1) tile_of_product<T, 1>(a, row, column, b, slots, units, depth, done);
}

// Runs work() on each of `threads` threads; on one without the price of entering a parallel region.
template <class Work>
inline void in_parallel(int threads, const Work& work) {
  if (threads == 1) return work();
#pragma omp parallel num_threads(threads)
  work();
}

// Runs work(first slot, number of vectors) for each tile of slots, inside in_parallel.
template <class T, class Work>
inline void for_tiles(const Net<T>& net, const Work& work) {
#pragma omp for schedule(static)
  for (int64_t tile = 0; tile < net.num_tiles(); ++tile) {
    const int64_t first = tile * kVectors * kLanes<T>;
    work(first, static_cast<int>(std::min<int64_t>(kVectors, (net.slots - first) / kLanes<T>)));
  }
}

// Copies one tile of x [units, N] to y [N, width] slot by slot; both point at the tile's first slot.
template <class T>
inline void turn(const T* x, int64_t slots, int64_t units, int vectors, T* y, int64_t width) {
  for (int64_t unit = 0; unit < units; unit += kLanes<T>)
    for (int64_t s = 0; s < vectors * kLanes<T>; s += kLanes<T>) {
      Vector<T> square[kLanes<T>];
      for (int64_t i = 0; i < kLanes<T>; ++i)
        square[i] = unit + i < units ? load<T>(x + (unit + i) * slots + s) : Vector<T>{};
      transpose<T>(square);
      for (int64_t i = 0; i < kLanes<T>; ++i) store<T>(y + (s + i) * width + unit, square[i]);
    }
}

// What sums over slots go to: in place of what stands there, or added to it.
enum class Into { kPlace, kSum };

// R units by V vectors of sum_s scale[s] g[o, s] h[s, i] over `count` slots, to out[o * inputs + i], i < columns.
template <class T, int R, int V, bool Scaled>
inline void block_of_gradient(const T* g, int64_t slots, const T* h, int64_t width, const T* scale, int64_t count,
                              int64_t columns, T* out, int64_t inputs, Into into) {
  Vector<T> acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = Vector<T>{};
  for (int64_t s = 0; s < count; ++s) {
    Vector<T> x[V];
    for (int v = 0; v < V; ++v) {
      x[v] = load<T>(h + s * width + v * kLanes<T>);
      if constexpr (Scaled) x[v] *= scale[s];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T weight = g[r * slots + s];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += weight * x[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* place = out + r * inputs + v * kLanes<T>;
      const int64_t left = columns - v * kLanes<T>;
      if (left >= kLanes<T>) store<T>(place, into == Into::kSum ? load<T>(place) + acc[r][v] : acc[r][v]);
      else
        for (int64_t i = 0; i < left; ++i) place[i] = into == Into::kSum ? place[i] + acc[r][v][i] : acc[r][v][i];
    }
}

// The same for C columns of few, as sums along slots: h stands unit by unit.
template <class T, int R, int C, bool Scaled>
inline void narrow_gradient(const T* g, int64_t slots, const T* h, const T* scale, T* out, int64_t inputs, Into into) {
  Vector<T> acc[R][C] = {};
  for (int64_t s = 0; s < slots; s += kLanes<T>) {
    Vector<T> x[C];
    for (int c = 0; c < C; ++c) {
      x[c] = load<T>(h + c * slots + s);
      if constexpr (Scaled) x[c] *= load<T>(scale + s);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] += load<T>(g + r * slots + s) * x[c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      const T sum = lane_sum<T>(acc[r][c]);
      out[r * inputs + c] = into == Into::kSum ? out[r * inputs + c] + sum : sum;
    }
}

template <class T, bool Scaled>
inline T sum_over_slots(const T* g, const T* scale, int64_t slots) {
  Vector<T> total{};
  for (int64_t s = 0; s < slots; s += kLanes<T>)
    total += Scaled ? load<T>(g + s) * load<T>(scale + s) : load<T>(g + s);
  return lane_sum<T>(total);
}

// h_{l-1}: [units, N], and, for as many of them as are taken by vectors of units, slot by slot [N, units in vectors].
template <class T>
struct Inputs {
  int64_t units, wide;
  const T *by_unit, *by_slot;

  int64_t width() const { return (units + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
};

// R units of (scale * g) h^T over the slots begin ... begin + count, by vectors of units of h.
template <class T, int R, bool Scaled>
inline void wide_rows(const T* g, int64_t slots, const Inputs<T>& h, const T* scale, int64_t begin, int64_t count,
                      T* out, Into into) {
  constexpr int V = R == 1 ? 2 * kColumns : kColumns;
  const int64_t width = h.width(), wide = h.wide;
  const T *from = h.by_slot + begin * width, *some = Scaled ? scale + begin : nullptr;
  g += begin;
  int64_t c = 0;
  for (; c + V * kLanes<T> <= (wide + kLanes<T> - 1) / kLanes<T> * kLanes<T>; c += V * kLanes<T>)
    block_of_gradient<T, R, V, Scaled>(g, slots, from + c, width, some, count, wide - c, out + c, h.units, into);
  for (; c < wide; c += kLanes<T>)
    block_of_gradient<T, R, 1, Scaled>(g, slots, from + c, width, some, count, wide - c, out + c, h.units, into);
}

// The same for the units of h after those, over all slots.
template <class T, int R, bool Scaled>
inline void narrow_rows(const T* g, int64_t slots, const Inputs<T>& h, const T* scale, T* out, Into into) {
  constexpr int C = R == 1 ? 4 : 2;
  int64_t c = h.wide;
  for (; c + C <= h.units; c += C)
    narrow_gradient<T, R, C, Scaled>(g, slots, h.by_unit + c * slots, scale, out + c, h.units, into);
  for (; c < h.units; ++c)
    narrow_gradient<T, R, 1, Scaled>(g, slots, h.by_unit + c * slots, scale, out + c, h.units, into);
}

// (scale * g) h^T to weight [units, inputs] and sums over slots to bias if there is one, for the units from `first` to
// `last`.
template <class T, bool Scaled>
inline void add_gradient(const T* g, const Inputs<T>& h, const T* scale, int64_t slots, int64_t first, int64_t last,
                         T* weight, T* bias, Into into) {
  const int64_t tiled = first + (last - first) / kRows * kRows;
  for (int64_t begin = 0; begin < slots; begin += kChunk) {
    const int64_t count = std::min(slots - begin, kChunk);
    const Into now = begin ? Into::kSum : into;
    for (int64_t o = first; o < tiled; o += kRows)
      wide_rows<T, kRows, Scaled>(g + o * slots, slots, h, scale, begin, count, weight + o * h.units, now);
    for (int64_t o = tiled; o < last; ++o)
      wide_rows<T, 1, Scaled>(g + o * slots, slots, h, scale, begin, count, weight + o * h.units, now);
  }
  for (int64_t o = first; o < tiled; o += kRows)
    narrow_rows<T, kRows, Scaled>(g + o * slots, slots, h, scale, weight + o * h.units, into);
  for (int64_t o = tiled; o < last; ++o)
    narrow_rows<T, 1, Scaled>(g + o * slots, slots, h, scale, weight + o * h.units, into);
  if (bias == nullptr) return;
  for (int64_t o = first; o < last; ++o) {
    const T sum = sum_over_slots<T, Scaled>(g + o * slots, scale, slots);
    bias[o] = into == Into::kSum ? bias[o] + sum : sum;
  }
}

// Runs work(layer, first unit, last unit, W_l's and b_l's place in a flat gradient) for each group of units.
template <class T, class Work>
inline void for_unit_groups(const Net<T>& net, const Work& work) {
  int64_t begin = 0;
  for (int64_t layer = 1; layer <= net.depth; ++layer) {
    const int64_t units = net.sizes[layer], num_weights = units * net.sizes[layer - 1];
#pragma omp for schedule(static, 1) nowait
    for (int64_t first = 0; first < units; first += kGroup)
      work(layer, first, std::min(first + kGroup, units), begin, begin + num_weights);
    begin += num_weights + units;
  }
#pragma omp barrier
}

// h_{l-1} in arrays of the layers from `first` on.
template <class T>
inline Inputs<T> inputs_of(const Net<T>& net, int64_t layer, int64_t first, const T* h, const T* h_by_slot) {
  const int64_t below = layer - 1, units = net.sizes[below];
  const int64_t wide = units % kLanes<T> <= kFewInputs ? units / kLanes<T> * kLanes<T> : units;
  const int64_t begin = net.offset(below, first), begin_by_slot = net.offset_by_slot(below, first);
  return {units, net.is_turned(below) ? wide : 0, h + begin, h_by_slot + begin_by_slot};
}

// The gradients of all layers for cotangents g (layers 1 ... L), each times scale, into out [p].
template <class T>
inline void gradient(const Net<T>& net, const T* h, const T* h_by_slot, const T* g, const T* scale, T* out) {
  for_unit_groups<T>(net, [&](int64_t layer, int64_t first, int64_t last, int64_t weight, int64_t bias) {
    const T* cotangent = g + net.offset(layer, 1);
    const Inputs<T> inputs = inputs_of(net, layer, 0, h, h_by_slot);
    T *to = out + weight, *sums = out + bias;
    if (scale) add_gradient<T, true>(cotangent, inputs, scale, net.slots, first, last, to, sums, Into::kPlace);
    else add_gradient<T, false>(cotangent, inputs, nullptr, net.slots, first, last, to, sums, Into::kPlace);
  });
}

// h_0 ... h_{L-1} and z_L, one behind the other in h, and in h_by_slot slot by slot what gradients take so, from
// x(s, i) = x[s * x_slot + i * x_unit], s < n.
template <class T>
void forward(const Net<T>& net, const T* x, int64_t x_slot, int64_t x_unit, int64_t n, T* h, T* h_by_slot,
             int threads) {
  const auto tile = [&](int64_t first, int vectors) {
    const int64_t end = first + vectors * kLanes<T>;
    for (int64_t i = 0; i < net.sizes[0]; ++i)
      for (int64_t s = first; s < end; ++s) h[i * net.slots + s] = s < n ? x[s * x_slot + i * x_unit] : T(0);
    const T* input = h + first;
    for (int64_t layer = 1; layer <= net.depth; ++layer) {
      const int64_t width = net.width(layer - 1);
      if (net.is_turned(layer - 1))
        turn<T>(input, net.slots, net.sizes[layer - 1], vectors,
                h_by_slot + net.offset_by_slot(layer - 1, 0) + first * width, width);
      T* output = h + net.offset(layer, 0) + first;
      const T* bias = net.bias(layer);
      const bool last = layer == net.depth;
      const Activation kind = last ? kTanh : net.activation(layer);
      product<T>(net.weight(layer), net.sizes[layer - 1], 1, input, net.slots, net.sizes[layer], net.sizes[layer - 1],
                 vectors, [&](int64_t unit, int64_t slot, Vector<T> z) {
                   z += bias[unit];
                   store<T>(output + unit * net.slots + slot, last ? z : activate(kind, z));
                 });
      input = output;
    }
  };
  in_parallel(threads, [&] { for_tiles<T>(net, tile); });
}

// g_{layer-1} = phi' * W^T g_layer on one tile of slots.
template <class T>
inline void pull_back(const Net<T>& net, int64_t layer, const T* h, const T* g, T* below, int64_t first, int vectors) {
  const T* hidden = h + net.offset(layer - 1, 0) + first;
  const Activation kind = net.activation(layer - 1);
  product<T>(net.weight(layer), 1, net.sizes[layer - 1], g + first, net.slots, net.sizes[layer - 1], net.sizes[layer],
             vectors, [&](int64_t unit, int64_t slot, Vector<T> back) {
               const int64_t at = unit * net.slots + slot;
               store<T>(below + first + at, back * slope(kind, load<T>(hidden + at)));
             });
}

// Cotangents g of layers 1 ... L from output [d_L, n], and if `out` is given the gradient [p].
template <class T>
void backward(const Net<T>& net, const T* h, const T* h_by_slot, const T* output, int64_t n, T* g, T* out,
              int threads) {
  T* top = g + net.offset(net.depth, 1);
  in_parallel(threads, [&] {
    for_tiles<T>(net, [&](int64_t first, int vectors) {
      const int64_t end = first + vectors * kLanes<T>;
      for (int64_t o = 0; o < net.sizes[net.depth]; ++o)
        for (int64_t s = first; s < end; ++s) top[o * net.slots + s] = s < n ? output[o * n + s] : T(0);
      for (int64_t layer = net.depth; layer > 1; --layer)
        pull_back(net, layer, h, g + net.offset(layer, 1), g + net.offset(layer - 1, 1), first, vectors);
    });
    if (out) gradient<T>(net, h, h_by_slot, g, nullptr, out);
  });
}

// out[s] = sum over layers and units of g_l (dW_l h_{l-1} + db_l), `direction` holding dW and db.
template <class T>
void jvp(const Net<T>& direction, const T* h, const T* g, T* out, int threads) {
  const Net<T>& net = direction;
  const auto tile = [&](int64_t first, int vectors) {
    Vector<T> total[kVectors] = {};
    for (int64_t layer = 1; layer <= net.depth; ++layer) {
      const T* cotangent = g + net.offset(layer, 1) + first;
      const T* bias = net.bias(layer);
      product<T>(net.weight(layer), net.sizes[layer - 1], 1, h + net.offset(layer - 1, 0) + first, net.slots,
                 net.sizes[layer], net.sizes[layer - 1], vectors, [&](int64_t unit, int64_t slot, Vector<T> moved) {
                   total[slot / kLanes<T>] += load<T>(cotangent + unit * net.slots + slot) * (moved + bias[unit]);
                 });
    }
    for (int v = 0; v < vectors; ++v) store<T>(out + first + v * kLanes<T>, total[v]);
  };
  in_parallel(threads, [&] { for_tiles<T>(net, tile); });
}

// A parameter of layer l: its unit r, and its input c, or -1 for a bias.
struct Coordinate {
  int64_t layer, unit, input;
};

// What is not 0 of an array [d, N]: nothing, one unit, or all.
struct Support {
  enum Kind { kNone, kUnit, kAll } kind;
  int64_t unit;
};

// One row of sum_s a_s J_s J_s^T + u_s Hessian(V_s): see MLPPass.second_order_row.
template <class T>
struct SecondOrderRow {
  const Net<T>& net;
  Coordinate at;
  const T *h, *h_by_slot;              // h_0 ... z_L, and all but z_L slot by slot
  const T *g, *u, *a;                  // G_1 ... G_L; u and a [N]
  T *tangent, *moved, *moved_by_slot;  // of z and of h, layers 1 ... L - 1
  T* q;                                // of G, and in its place u dG + a j G; layers 1 ... L

  Vector<T> drive(int64_t slot) const {
    if (at.input < 0) return Vector<T>{} + 1;
    return load<T>(h + net.offset(at.layer - 1, 0) + at.input * net.slots + slot);
  }

  // dz and dh: of one unit in the parameter's layer, of all units above it.
  void push(int64_t first, int vectors) const {
    if (at.layer == net.depth) return;
    const int64_t unit = at.unit * net.slots + first;
    for (int64_t s = 0; s < vectors * kLanes<T>; s += kLanes<T>)
      set_tangent(at.layer, unit + s, drive(first + s));
    for (int64_t layer = at.layer + 1; layer < net.depth; ++layer) {
      const Support below{layer == at.layer + 1 ? Support::kUnit : Support::kAll, at.unit};
      apply(net.weight(layer), net.sizes[layer - 1], 1, below, moved + net.offset(layer - 1, 1) + first, layer,
            layer - 1, vectors, [&](int64_t place, Vector<T> dz) { set_tangent(layer, place + first, dz); });
      const int64_t width = net.width(layer);
      if (net.is_turned(layer))
        turn<T>(moved + net.offset(layer, 1) + first, net.slots, net.sizes[layer], vectors,
                moved_by_slot + net.offset_by_slot(layer, 1) + first * width, width);
    }
  }

  void set_tangent(int64_t layer, int64_t place, Vector<T> dz) const {
    const int64_t begin = net.offset(layer, 1) + place;
    store<T>(tangent + begin, dz);
    store<T>(moved + begin, dz * slope(net.activation(layer), load<T>(h + net.offset(layer, 0) + place)));
  }

  // The matrix a(r, k) = a[r * row + k * column] from layer `from` to layer `to`, on an input of known support.
  template <class Done>
  void apply(const T* a, int64_t row, int64_t column, Support support, const T* input, int64_t to, int64_t from,
             int vectors, const Done& done) const {
    const bool all = support.kind == Support::kAll;
    const int64_t skip = all ? 0 : support.unit;
    product<T>(a + skip * column, row, column, input + skip * net.slots, net.slots, net.sizes[to],
               all ? net.sizes[from] : 1, vectors,
               [&](int64_t unit, int64_t slot, Vector<T> value) { done(unit * net.slots + slot, value); });
  }

  // dG_l = phi' (W_{l+1}^T dG_{l+1} + [l + 1 is the parameter's layer] e_c G[r]) + (phi''/phi') G_l dz_l, downwards.
  void pull(int64_t first, int vectors) const {
    Support above{Support::kNone, 0};
    for (int64_t layer = net.depth - 1; layer >= 1; --layer) {
      const Support own = change_from(layer, above, first, vectors);
      combine(layer + 1, above, first, vectors);
      above = own;
    }
    combine(1, above, first, vectors);
  }

  Support change_from(int64_t layer, Support above, int64_t first, int vectors) const {
    const Activation kind = net.activation(layer);
    const T* hidden = h + net.offset(layer, 0) + first;
    T* output = q + net.offset(layer, 1) + first;
    const int64_t slots = vectors * kLanes<T>;
    if (above.kind == Support::kNone) {
      for (int64_t unit = 0; unit < net.sizes[layer]; ++unit) std::fill_n(output + unit * net.slots, slots, T(0));
    } else {
      apply(net.weight(layer + 1), 1, net.sizes[layer], above, q + net.offset(layer + 1, 1) + first, layer,
            layer + 1, vectors, [&](int64_t place, Vector<T> back) {
              store<T>(output + place, back * slope(kind, load<T>(hidden + place)));
            });
    }
    Support support{above.kind == Support::kNone ? Support::kNone : Support::kAll, 0};
    if (layer + 1 == at.layer && at.input >= 0) {
      const T* passed = g + net.offset(at.layer, 1) + at.unit * net.slots + first;
      for (int64_t s = 0; s < slots; s += kLanes<T>) {
        const int64_t place = at.input * net.slots + s;
        add(output + place, load<T>(passed + s) * slope(kind, load<T>(hidden + place)));
      }
      if (support.kind == Support::kNone) support = {Support::kUnit, at.input};
    }
    if (layer < at.layer || kind == kRelu) return support;
    const bool one = layer == at.layer;
    for (int64_t unit = one ? at.unit : 0; unit < (one ? at.unit + 1 : net.sizes[layer]); ++unit)
      for (int64_t s = 0; s < slots; s += kLanes<T>) {
        const int64_t place = unit * net.slots + s, all = net.offset(layer, 1) + first + place;
        add(output + place, curvature_ratio(kind, load<T>(hidden + place)) * load<T>(g + all) * load<T>(tangent + all));
      }
    if (!one) return {Support::kAll, 0};
    return support.kind == Support::kNone ? Support{Support::kUnit, at.unit} : support;
  }

  static void add(T* p, Vector<T> v) { store<T>(p, load<T>(p) + v); }

  // q = u dG + a j G.
  void combine(int64_t layer, Support support, int64_t first, int vectors) const {
    const int64_t begin = net.offset(layer, 1) + first;
    const T* own = g + net.offset(at.layer, 1) + at.unit * net.slots;
    for (int64_t s = 0; s < vectors * kLanes<T>; s += kLanes<T>) {
      const int64_t slot = first + s;
      const Vector<T> outer = load<T>(a + slot) * load<T>(own + slot) * drive(slot), inner = load<T>(u + slot);
      for (int64_t unit = 0; unit < net.sizes[layer]; ++unit) {
        const int64_t place = begin + unit * net.slots + s;
        Vector<T> value = outer * load<T>(g + place);
        if (support.kind != Support::kNone) value += inner * load<T>(q + place);
        store<T>(q + place, value);
      }
    }
  }

  // q_l h_{l-1}^T + (u G_l) dh_{l-1}^T for all layers, into out [p].
  void gradient_into(T* out) const {
    gradient<T>(net, h, h_by_slot, q, nullptr, out);
    for_unit_groups<T>(net, [&](int64_t layer, int64_t first, int64_t last, int64_t weight, int64_t) {
      const int64_t below = layer - 1;
      const T* own = g + net.offset(layer, 1);
      if (below > at.layer)
        add_gradient<T, true>(own, inputs_of(net, layer, 1, moved, moved_by_slot), u, net.slots, first, last,
                              out + weight, nullptr, Into::kSum);
      if (below != at.layer) return;
      for (int64_t o = first; o < last; ++o)
        out[weight + o * net.sizes[below] + at.unit] += dot_of_unit(own + o * net.slots);
    });
  }

  // sum_s u_s G_s dh_s for one unit of G and the one unit of h that moves in the parameter's layer.
  T dot_of_unit(const T* own) const {
    const T* unit_moved = moved + net.offset(at.layer, 1) + at.unit * net.slots;
    Vector<T> total{};
    for (int64_t s = 0; s < net.slots; s += kLanes<T>)
      total += load<T>(u + s) * load<T>(own + s) * load<T>(unit_moved + s);
    return lane_sum<T>(total);
  }
};

// `count` rows into out [count, p]; `work` holds three arrays like g and one like h_by_slot.
template <class T>
void second_order_rows(const Net<T>& net, const T* h, const T* h_by_slot, const T* g, const T* u, const T* a,
                       const int64_t* coordinates, int64_t count, T* work, T* out, int threads) {
  const int64_t size = net.offset(net.depth + 1, 1);
  in_parallel(threads, [&] {
    for (int64_t k = 0; k < count; ++k) {
      const Coordinate at{coordinates[3 * k], coordinates[3 * k + 1], coordinates[3 * k + 2]};
      const SecondOrderRow<T> row{net, at, h, h_by_slot, g, u, a, work, work + size, work + 3 * size,
                                  work + 2 * size};
      for_tiles<T>(net, [&](int64_t first, int vectors) {
        row.push(first, vectors);
        row.pull(first, vectors);
      });
      row.gradient_into(out + k * net.num_parameters());
    }
  });
}

// sum_s a_s J_s J_s^T x + u_s Hessian(V_s) x for one `direction` x of all parameters, into out [p]: as a row, with
// tangents of all units. `work` as for rows.
template <class T>
struct SecondOrderProduct {
  const Net<T>&net, &direction;
  const T *h, *h_by_slot, *g, *u, *a;
  T *tangent, *moved, *moved_by_slot, *q;

  // dz_l = dW_l h_{l-1} + db_l + W_l dh_{l-1}.
  void push(int64_t first, int vectors) const {
    for (int64_t layer = 1; layer <= net.depth; ++layer) {
      const int64_t inputs = net.sizes[layer - 1], begin = net.offset(layer, 1) + first;
      const T* bias = direction.bias(layer);
      product<T>(direction.weight(layer), inputs, 1, h + net.offset(layer - 1, 0) + first, net.slots, net.sizes[layer],
                 inputs, vectors, [&](int64_t unit, int64_t slot, Vector<T> dz) {
                   store<T>(tangent + begin + unit * net.slots + slot, dz + bias[unit]);
                 });
      if (layer > 1)
        product<T>(net.weight(layer), inputs, 1, moved + net.offset(layer - 1, 1) + first, net.slots, net.sizes[layer],
                   inputs, vectors, [&](int64_t unit, int64_t slot, Vector<T> dz) {
                     add(tangent + begin + unit * net.slots + slot, dz);
                   });
      if (layer < net.depth) move(layer, first, vectors);
    }
  }

  // dh_l = phi' dz_l.
  void move(int64_t layer, int64_t first, int vectors) const {
    const int64_t begin = net.offset(layer, 1) + first, width = net.width(layer);
    const T* hidden = h + net.offset(layer, 0) + first;
    for (int64_t unit = 0; unit < net.sizes[layer]; ++unit)
      for (int64_t s = unit * net.slots; s < unit * net.slots + vectors * kLanes<T>; s += kLanes<T>)
        store<T>(moved + begin + s, load<T>(tangent + begin + s) * slope(net.activation(layer), load<T>(hidden + s)));
    if (net.is_turned(layer))
      turn<T>(moved + begin, net.slots, net.sizes[layer], vectors,
              moved_by_slot + net.offset_by_slot(layer, 1) + first * width, width);
  }

  // dG_l = phi' (W_{l+1}^T dG_{l+1} + dW_{l+1}^T G_{l+1}) + (phi''/phi') G_l dz_l, downwards from dG_L = 0.
  void pull(int64_t first, int vectors) const {
    for (int64_t layer = net.depth - 1; layer >= 1; --layer) {
      const int64_t units = net.sizes[layer], begin = net.offset(layer, 1) + first;
      const int64_t above = net.offset(layer + 1, 1) + first;
      const Activation kind = net.activation(layer);
      const T* hidden = h + net.offset(layer, 0) + first;
      const auto pull_back = [&](const T* weight, const T* cotangent, const auto& done) {
        product<T>(weight, 1, units, cotangent + above, net.slots, units, net.sizes[layer + 1], vectors, done);
      };
      pull_back(direction.weight(layer + 1), g, [&](int64_t unit, int64_t slot, Vector<T> back) {
        const int64_t place = unit * net.slots + slot;
        const Vector<T> own = load<T>(hidden + place);
        store<T>(q + begin + place, back * slope(kind, own) + curvature_ratio(kind, own) * load<T>(g + begin + place) *
                                                                  load<T>(tangent + begin + place));
      });
      if (layer + 1 == net.depth) continue;
      pull_back(net.weight(layer + 1), q, [&](int64_t unit, int64_t slot, Vector<T> back) {
        const int64_t place = unit * net.slots + slot;
        add(q + begin + place, back * slope(kind, load<T>(hidden + place)));
      });
    }
  }

  // q_l = u dG_l + a dV G_l.
  void combine(int64_t first, int vectors) const {
    const T* top = tangent + net.offset(net.depth, 1) + first;
    for (int64_t s = 0; s < vectors * kLanes<T>; s += kLanes<T>) {
      const Vector<T> outer = load<T>(a + first + s) * load<T>(top + s), inner = load<T>(u + first + s);
      // dG_L = 0.
      for (int64_t at = first + s; at < net.offset(net.depth + 1, 1); at += net.slots) {
        const Vector<T> changed = at < net.offset(net.depth, 1) ? inner * load<T>(q + at) : Vector<T>{};
        store<T>(q + at, outer * load<T>(g + at) + changed);
      }
    }
  }

  static void add(T* p, Vector<T> v) { store<T>(p, load<T>(p) + v); }

  // q_l h_{l-1}^T + (u G_l) dh_{l-1}^T for all layers.
  void gradient_into(T* out) const {
    gradient<T>(net, h, h_by_slot, q, nullptr, out);
    for_unit_groups<T>(net, [&](int64_t layer, int64_t first, int64_t last, int64_t weight, int64_t) {
      if (layer > 1)
        add_gradient<T, true>(g + net.offset(layer, 1), inputs_of(net, layer, 1, moved, moved_by_slot), u, net.slots,
                              first, last, out + weight, nullptr, Into::kSum);
    });
  }
};

template <class T>
void second_order_product(const Net<T>& net, const Net<T>& direction, const T* h, const T* h_by_slot, const T* g,
                          const T* u, const T* a, T* work, T* out, int threads) {
  const int64_t size = net.offset(net.depth + 1, 1);
  const SecondOrderProduct<T> product{net, direction, h, h_by_slot, g, u, a, work, work + size, work + 3 * size,
                                      work + 2 * size};
  in_parallel(threads, [&] {
    for_tiles<T>(net, [&](int64_t first, int vectors) {
      product.push(first, vectors);
      product.pull(first, vectors);
      product.combine(first, vectors);
    });
    product.gradient_into(out);
  });
}

// `count` gradients into out [count, p], for the unit cotangents g times each of scale [count, N].
template <class T>
void scaled_gradients(const Net<T>& net, const T* h, const T* h_by_slot, const T* g, const T* scale, int64_t count,
                      T* out, int threads) {
  in_parallel(threads, [&] {
    for (int64_t k = 0; k < count; ++k)
      gradient<T>(net, h, h_by_slot, g, scale + k * net.slots, out + k * net.num_parameters());
  });
}

// dV/dw of `count` parameters into out [count, N], for unit cotangents g.
template <class T>
void jacobian_columns(const Net<T>& net, const T* h, const T* g, const int64_t* coordinates, int64_t count, T* out,
                      int) {
  for (int64_t k = 0; k < count; ++k) {
    const Coordinate at{coordinates[3 * k], coordinates[3 * k + 1], coordinates[3 * k + 2]};
    const T* own = g + net.offset(at.layer, 1) + at.unit * net.slots;
    const T* input = h + net.offset(at.layer - 1, 0) + at.input * net.slots;
    for (int64_t s = 0; s < net.slots; s += kLanes<T>)
      store<T>(out + k * net.slots + s, at.input < 0 ? load<T>(own + s) : load<T>(own + s) * load<T>(input + s));
  }
}

BLPO_FUNCTION(forward)
BLPO_FUNCTION(jacobian_columns)
BLPO_FUNCTION(backward)
BLPO_FUNCTION(jvp)
BLPO_FUNCTION(scaled_gradients)
BLPO_FUNCTION(second_order_product)
BLPO_FUNCTION(second_order_rows)

}  // namespace
