// The CUDA kernel for every kind that has none of its own, for strided rows, for gradients of another storage than
// their parameter, and for rows of which only an average is updated. Device code only. Launched by sgd_cuda.cu.
//
// A warp steps a unit of 128 elements at a time, every 32nd of them a lane's. How operands are stored is known at run
// time, the same for a whole tile; a unit's loads come first, as plain bits, so that they are under way together, and
// what they mean is looked at afterwards.
#pragma once

#include "cuda/cuda_state.cuh"

namespace wd_fused {

inline constexpr int kUnitElements = static_cast<int>(kMomentumBlock);
inline constexpr int kOfLane = kUnitElements / kCudaWarp;

// How many bytes an element of an operand has; none: there is no such operand, or it is not looked at. float64 is
// neither.
struct Width {
  bool is_four;
  bool is_two;
  bool is_one;
};
WD_FUSED_DEVICE Width width_of(int64_t bytes) { return {bytes == 4, bytes == 2, bytes == 1}; }

// A tile's operands at its first element (at the row's, where that is strided).
struct GeneralPiece {
  Kind kind;
  Storage gradient_storage;
  Momentum momentum;
  bool only_averages;
  bool rounds;
  bool zeroes;
  char* param;
  char* gradient;
  char* buffer;
  char* extra;
  char* average;
  float* scale;
  const int64_t* layout;  // null: flat
  int64_t begin;
  int64_t first;  // as PackedLayouts has it
  int count;
  RowKey key;
  WD_FUSED_DEVICE bool has_blocks() const { return momentum != Momentum::none && kind.momentum == Storage::int8; }
  WD_FUSED_DEVICE Width of_param() const { return width_of(bytes_of(kind.param)); }
  WD_FUSED_DEVICE Width of_gradient() const { return width_of(only_averages ? 0 : bytes_of(gradient_storage)); }
  WD_FUSED_DEVICE Width of_buffer(bool reads) const {
    const bool is_used = reads ? momentum == Momentum::running : momentum != Momentum::none;
    return width_of(is_used ? bytes_of(kind.momentum) : 0);
  }
  WD_FUSED_DEVICE Width of_extra() const { return width_of(bytes_of_extra(kind.weights, kind.param)); }
  WD_FUSED_DEVICE Width of_average() const { return width_of(kind.averages ? bytes_of(kind.average) : 0); }
};

WD_FUSED_DEVICE GeneralPiece general_piece(const OptionsTile& tile, const CudaGroupOptions& group, uint64_t word,
                                           const int64_t* layouts) {
  GeneralPiece piece;
  piece.kind = Kind::of(tile.kind);
  piece.gradient_storage = static_cast<Storage>((word >> kGradientStorageBits) & 3);
  piece.only_averages = (word & kIsAveraged) != 0;
  piece.momentum = !group.sgd.has_momentum || piece.only_averages ? Momentum::none
                   : (word & kFirstStep) != 0                     ? Momentum::first
                                                                  : Momentum::running;
  // Of a compensated weight what the next forward pass sees is averaged, and nothing else is done here.
  if (piece.only_averages && piece.kind.weights == Weights::kahan) piece.kind.weights = Weights::parameter;
  piece.rounds = piece.kind.rounds && piece.gradient_storage == piece.kind.param;
  piece.zeroes = (tile.kind & kZeroesGradient) != 0;
  piece.begin = int64_t{tile.piece} * (kCudaTileBytes / bytes_of(piece.kind.param));
  piece.count = tile.count;
  piece.layout = tile.layout < 0 ? nullptr : layouts + tile.layout;
  piece.first = piece.kind.stochastic ? first_index(layouts, tile.layout) : 0;
  piece.param = in_global_memory(static_cast<char*>(tile.param));
  piece.buffer = in_global_memory(static_cast<char*>(tile.momentum_buffer));
  piece.extra = in_global_memory(static_cast<char*>(tile.extra));
  piece.average = in_global_memory(static_cast<char*>(tile.average));
  piece.scale = in_global_memory(tile.momentum_scale);
  piece.key = row_key(group.random_key, tile.position);
  auto* gradient = reinterpret_cast<char*>(word & kGradientAddress);
  if (!piece.only_averages && tile.layout < 0) gradient += piece.begin * bytes_of(piece.gradient_storage);
  piece.gradient = in_global_memory(gradient);
  return piece;
}

// Where one element of each operand lies, counted in elements.
struct Offsets {
  int64_t param, gradient, buffer, extra, average, place;
};
// Any strides: the element's index divided by the sizes from the innermost out.
WD_FUSED_DEVICE Offsets offsets_of(const GeneralPiece& piece, int element) {
  if (piece.layout == nullptr) return {element, element, element, element, element, element};
  const int64_t* sizes = in_global_memory(piece.layout) + 1;
  const int dims = static_cast<int>(sizes[-1]);
  int64_t index = piece.begin + element;
  Offsets offsets{};
#pragma unroll 1  // few dimensions, and a slow path: its registers must not be everybody's
  for (int d = dims - 1; d >= 0; --d) {
    const int64_t at = index % sizes[d];
    index /= sizes[d];
    offsets.param += at * sizes[dims + d];
    offsets.gradient += at * sizes[2 * dims + d];
    offsets.buffer += at * sizes[3 * dims + d];
    offsets.extra += at * sizes[4 * dims + d];
    offsets.average += at * sizes[5 * dims + d];
    offsets.place += at * sizes[6 * dims + d];
  }
  return offsets;
}
// In the whole parameter.
WD_FUSED_DEVICE int64_t index_of(const GeneralPiece& piece, int element) {
  if (piece.layout == nullptr) return piece.first + piece.begin + element;
  return piece.first < 0 ? piece.begin + element : piece.first + offsets_of(piece, element).place;
}

WD_FUSED_DEVICE uint32_t read_bits(const char* base, int64_t at, Width width) {
  base = in_global_memory(base);
  if (width.is_four) return reinterpret_cast<const uint32_t*>(base)[at];
  if (width.is_two) return reinterpret_cast<const uint16_t*>(base)[at];
  if (width.is_one) return reinterpret_cast<const uint8_t*>(base)[at];
  return 0;
}
WD_FUSED_DEVICE void write_bits(char* base, int64_t at, Width width, uint32_t bits) {
  base = in_global_memory(base);
  if (width.is_four)
    reinterpret_cast<uint32_t*>(base)[at] = bits;
  else if (width.is_two)
    reinterpret_cast<uint16_t*>(base)[at] = static_cast<uint16_t>(bits);
  else if (width.is_one)
    reinterpret_cast<uint8_t*>(base)[at] = static_cast<uint8_t>(bits);
}
WD_FUSED_DEVICE void write_zero(const GeneralPiece& piece, int64_t at) {
  if (piece.gradient_storage == Storage::float64)
    reinterpret_cast<uint64_t*>(in_global_memory(piece.gradient))[at] = 0;
  else
    write_bits(piece.gradient, at, piece.of_gradient(), 0);
}

// A number as its bits are stored: a float but for int8, whose scale it lacks.
WD_FUSED_DEVICE float number_of(uint32_t bits, Storage storage) {
  if (storage == Storage::float32) return bits_as<float>(bits);
  if (storage == Storage::bfloat16) return load(BFloat16{static_cast<uint16_t>(bits)});
  return load(Float16{static_cast<uint16_t>(bits)});
}
template <class T>
WD_FUSED_DEVICE uint32_t bits_of(float rounded_number) {
  return pack<T>(rounded_number).bits;
}
WD_FUSED_DEVICE uint32_t rounded_bits(float x, Storage storage) {
  if (storage == Storage::float32) return bits_as<uint32_t>(x);
  if (storage == Storage::bfloat16) return bits_of<BFloat16>(rounded<BFloat16>(x));
  return bits_of<Float16>(rounded<Float16>(x));
}

// --- rows whose opmath is float

// All bits that a lane needs of one element.
struct Bits {
  uint32_t param, gradient, buffer, extra, average;
};
WD_FUSED_DEVICE Bits read_element(const GeneralPiece& piece, int element) {
  const Offsets at = offsets_of(piece, element);
  Bits bits;
  if (!piece.only_averages && piece.gradient_storage == Storage::float64)
    bits.gradient = bits_as<uint32_t>(
        to_opmath<float>(reinterpret_cast<const uint64_t*>(in_global_memory(piece.gradient))[at.gradient]));
  else
    bits.gradient = read_bits(piece.gradient, at.gradient, piece.of_gradient());
  bits.param = read_bits(piece.param, at.param, piece.of_param());
  bits.buffer = read_bits(piece.buffer, at.buffer, piece.of_buffer(true));
  bits.extra = read_bits(piece.extra, at.extra, piece.of_extra());
  bits.average = read_bits(piece.average, at.average, piece.of_average());
  return bits;
}
WD_FUSED_DEVICE void write_element(const GeneralPiece& piece, int element, const Bits& bits) {
  const Offsets at = offsets_of(piece, element);
  write_bits(piece.average, at.average, piece.of_average(), bits.average);
  if (piece.only_averages) return;
  write_bits(piece.param, at.param, piece.of_param(), bits.param);
  write_bits(piece.buffer, at.buffer, piece.of_buffer(false), bits.buffer);
  write_bits(piece.extra, at.extra, piece.of_extra(), bits.extra);
  if (piece.zeroes) write_zero(piece, at.gradient);
}

template <class T>
WD_FUSED_DEVICE float weight_of(const GeneralPiece& piece, const Bits& bits) {
  const T p{static_cast<uint16_t>(bits.param)};
  const Weights weights = piece.kind.weights;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (weights == Weights::split) return load_split(p, static_cast<int16_t>(bits.extra));
    if (weights == Weights::split24) return load_split24(p, static_cast<int8_t>(bits.extra));
  }
  if (weights == Weights::full) return load_full(p, bits_as<float>(bits.extra));
  if (weights == Weights::kahan) return load(p) + load(T{static_cast<uint16_t>(bits.extra)});
  return load(p);
}
// w comes out as the average sees it.
template <class T>
WD_FUSED_DEVICE void store_weight(const GeneralPiece& piece, int element, float& w, Bits& bits) {
  const Weights weights = piece.kind.weights;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (piece.kind.stochastic) {
      w = stochastically_rounded(w, random_bits(piece.key, static_cast<uint64_t>(index_of(piece, element))));
      bits.param = bits_of<T>(w);
      return;
    }
    if (weights == Weights::split || weights == Weights::split24) {
      if (weights == Weights::split24) w = to_24_bits(w);
      const Split both = split(w);
      bits.param = both.p.bits;
      bits.extra = weights == Weights::split ? both.remainder : both.remainder >> 8;
      return;
    }
  }
  const float kept = rounded<T>(w);
  bits.param = bits_of<T>(kept);
  if (weights == Weights::full) {
    bits.extra = bits_as<uint32_t>(w);
    return;
  }
  if (weights == Weights::kahan) bits.extra = bits_of<T>(rounded<T>(lost<T>(w, kept)));
  w = kept;
}

template <class Rounding>
WD_FUSED_DEVICE void update(float& w, float g, float& b, Momentum momentum, const TileScalars<float, true>& scalars) {
  if (scalars.unscales) g = unscaled<Rounding, Numerics::torch>(g, scalars.inverse_grad_scale);
  if (scalars.clips) g = unscaled<Rounding, Numerics::torch>(g, scalars.clip);
  // A first step's formula is that without momentum, too, where nobody stores b.
  if (momentum == Momentum::running)
    sgd_update<Rounding, Numerics::torch, true, Momentum::running>(w, g, b, scalars.update, scalars.options);
  else
    sgd_update<Rounding, Numerics::torch, true, Momentum::first>(w, g, b, scalars.update, scalars.options);
}

// From bits to the numbers after the step, before they are stored.
WD_FUSED_DEVICE void step_element(const GeneralPiece& piece, const Bits& bits, float scale,
                                  const TileScalars<float, true>& scalars, float& w, float& b) {
  const Storage storage = piece.kind.param;
  w = storage == Storage::float32    ? bits_as<float>(bits.param)
      : storage == Storage::bfloat16 ? weight_of<BFloat16>(piece, bits)
                                     : weight_of<Float16>(piece, bits);
  if (piece.only_averages) return;
  // read_element has made float32 of a float64 gradient.
  const Storage of_gradient = piece.gradient_storage == Storage::float64 ? Storage::float32 : piece.gradient_storage;
  const float g = number_of(bits.gradient, of_gradient);
  b = piece.kind.momentum == Storage::int8 ? load_int8(static_cast<int8_t>(bits.buffer), scale)
                                           : number_of(bits.buffer, piece.kind.momentum);
  if (!piece.rounds)
    update<float>(w, g, b, piece.momentum, scalars);
  else if (storage == Storage::bfloat16)
    update<BFloat16>(w, g, b, piece.momentum, scalars);
  else
    update<Float16>(w, g, b, piece.momentum, scalars);
}
// The other way: w and b as they are stored, and the average.
WD_FUSED_DEVICE void store_element(const GeneralPiece& piece, int element, float scale, float average_weight, float w,
                                   float b, Bits& bits) {
  const Kind& kind = piece.kind;
  if (!piece.only_averages) {
    bits.buffer = kind.momentum == Storage::int8 ? static_cast<uint32_t>(static_cast<int32_t>(to_int8(b, scale)))
                                                 : rounded_bits(b, kind.momentum);
    if (kind.param == Storage::float32)
      bits.param = bits_as<uint32_t>(w);
    else if (kind.param == Storage::bfloat16)
      store_weight<BFloat16>(piece, element, w, bits);
    else
      store_weight<Float16>(piece, element, w, bits);
  }
  if (kind.averages)
    bits.average = rounded_bits(averaged<true>(number_of(bits.average, kind.average), w, average_weight), kind.average);
}

// Called by all lanes of a warp.
WD_FUSED_DEVICE void step_unit(const GeneralPiece& piece, int first, int lane,
                               const TileScalars<float, true>& scalars) {
  Bits bits[kOfLane]{};
  float w[kOfLane], b[kOfLane];
  const auto element = [&](int i) { return first + lane + kCudaWarp * i; };
  float* scale_at = in_global_memory(piece.scale) + first / kUnitElements;
  float scale = piece.has_blocks() ? *scale_at : 0.0f;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i)
    if (element(i) < piece.count) bits[i] = read_element(piece, element(i));
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    step_element(piece, bits[i], scale, scalars, w[i], b[i]);
    if (element(i) < piece.count) largest = max(largest, magnitude_bits(b[i]));
  }
  if (piece.has_blocks()) {
    scale = int8_scale(largest_of_lanes<kCudaWarp>(largest));
    if (lane == 0) *scale_at = scale;
  }
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    if (element(i) >= piece.count) continue;
    store_element(piece, element(i), scale, scalars.average_weight, w[i], b[i], bits[i]);
    write_element(piece, element(i), bits[i]);
  }
}

// --- float64 rows: their momentum buffer and average are float64, too

WD_FUSED_DEVICE double gradient_in_double(const GeneralPiece& piece, int64_t at) {
  if (piece.gradient_storage == Storage::float64) return reinterpret_cast<const double*>(piece.gradient)[at];
  return number_of(read_bits(piece.gradient, at, piece.of_gradient()), piece.gradient_storage);
}
WD_FUSED_DEVICE void step_double(const GeneralPiece& piece, int element, const TileScalars<double, true>& scalars) {
  const Offsets at = offsets_of(piece, element);
  double& w_at = reinterpret_cast<double*>(in_global_memory(piece.param))[at.param];
  double w = w_at;
  if (!piece.only_averages) {
    double g = gradient_in_double(piece, at.gradient);
    double* b_at = reinterpret_cast<double*>(in_global_memory(piece.buffer)) + at.buffer;
    double b = piece.momentum == Momentum::running ? *b_at : 0;
    if (scalars.unscales) g = multiply(g, scalars.inverse_grad_scale);
    if (scalars.clips) g = multiply(g, scalars.clip);
    if (piece.momentum == Momentum::running)
      sgd_update<double, Numerics::torch, true, Momentum::running>(w, g, b, scalars.update, scalars.options);
    else
      sgd_update<double, Numerics::torch, true, Momentum::first>(w, g, b, scalars.update, scalars.options);
    w_at = w;
    if (piece.momentum != Momentum::none) *b_at = b;
    if (piece.zeroes) write_zero(piece, at.gradient);
  }
  if (piece.kind.averages) {
    double& e = reinterpret_cast<double*>(in_global_memory(piece.average))[at.average];
    e = averaged<true>(e, w, scalars.average_weight);
  }
}

// One step of all tiles of a launch, OptionsTiles.
template <int kParameterBytes>
__global__ void __launch_bounds__(kCudaThreads, 2)
    general_kernel(const __grid_constant__ CudaParameters<kParameterBytes> all) {
  const CudaHeader& header = all.header;
  const TileOfThread me = tile_of_thread(header.small_tiles, header.tiles_in_launch, header.backwards);
  if (me.index < 0) return;
  const auto tile = in_table(static_cast<const OptionsTile*>(header.tiles) + me.index);
  const bool skips = is_skipped(header);
  const uint64_t word = all.words[tile.row];
  if (word == 0) return;
  const CudaGroupOptions& group = reinterpret_cast<const CudaGroupOptions*>(all.words + header.rows)[tile.group];
  const GeneralPiece piece = general_piece(tile, group, word, header.layouts);
  if (skips) {
    if (!piece.zeroes || piece.only_averages) return;
#pragma unroll 1
    for (int element = me.thread; element < piece.count; element += me.threads)
      write_zero(piece, offsets_of(piece, element).gradient);
    return;
  }
  if (piece.kind.param == Storage::float64) {
    const auto scalars = tile_scalars<double, true>(group, header);
#pragma unroll 1
    for (int element = me.thread; element < piece.count; element += me.threads) step_double(piece, element, scalars);
    return;
  }
  const auto scalars = tile_scalars<float, true, true>(group, header);
  const int lane = me.thread % kCudaWarp;
#pragma unroll 1
  for (int first = me.thread / kCudaWarp * kUnitElements; first < piece.count;
       first += me.threads / kCudaWarp * kUnitElements)
    step_unit(piece, first, lane, scalars);
}

}  // namespace wd_fused
