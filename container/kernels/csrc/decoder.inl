// The fused decoder, for one instruction set. See decoder.hpp.

namespace strongroom {
namespace STRONGROOM_ISA {

// to = x / rms(x) * weight over `count` values, a multiple of 8. `to` may be `x`.
static inline void normalize(const float* x, const float* weight, int count, float epsilon, float* to) {
  f8 squares = {};
  for (int at = 0; at < count; at += LANES) {
    const f8 part = load(x + at);
    squares += part * part;
  }
  const f8 factor = splat(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(count) + epsilon));
  for (int at = 0; at < count; at += LANES) store(to + at, load(weight + at) * (load(x + at) * factor));
}

// Rotates the leading `rotated` elements of one head, whose halves are the two coordinates.
static inline void rotate(float* head, const float* cosines, const float* sines, int rotated) {
  const int half = rotated / 2;
  for (int at = 0; at < half; at += LANES) {
    const f8 first = load(head + at), second = load(head + half + at);
    const f8 c = load(cosines + at), s = load(sines + at);
    store(head + at, first * c - second * s);
    store(head + half + at, second * c + first * s);
  }
}

static inline f8 gated(f8 gate, f8 up, Gate kind) {
  if (kind == Gate::SILU) return up * gate / (splat(1.0f) + exp(-gate));
  const f8 inner = gate * (splat(0.7978845608028654f) + splat(0.035677408136300125f) * gate * gate);
  return up * gate / (splat(1.0f) + exp(inner * splat(-2.0f)));  // 1 + tanh(z) = 2 / (1 + exp(-2 z))
}

// One forward's view of its arguments, so that operators need not pass them all on.
struct Pass {
  Member& member;
  const Decoder& decoder;
  const DecoderStep& step;
  const Scratch& scratch;

  // What a projection reads: rows as they are, and quantized.
  struct Input {
    const float* rows;
    Activations quantized;
  };

  // A lone row is prepared by every thread for itself, which costs less than waiting for the one who does.
  float* own_rows() const { return scratch.own_rows + member.rank() * scratch.widest; }

  Input own() const {
    const std::int64_t at = member.rank() * scratch.widest;
    return {own_rows(), from(scratch.own_quantized, Kind::INT8, at)};  // places lie as the wider kind needs them
  }

  // Norms `count` rows and quantizes them in one go, for weights of `kind`; row i is source(i).
  template <class Source>
  Input norm(int count, const float* weight, Kind kind, Source&& source) {
    const int hidden = decoder.hidden;
    const Input input = count == 1 ? own() : Input{scratch.narrow, scratch.quantized};
    float* rows = count == 1 ? own_rows() : scratch.narrow;
    const auto prepare = [&](int row) {
      const std::int64_t at = static_cast<std::int64_t>(row) * hidden;
      float* to = rows + at;
      normalize(source(row), weight, hidden, decoder.epsilon, to);
      if (!decoder.plain) quantize_row(kind, to, hidden, from(input.quantized, kind, at));
    };
    if (count == 1) {
      prepare(0);
    } else {
      member.share(count, prepare);
      member.barrier();
    }
    return input;
  }

  Input quantize_rows(const float* x, const BlockWeight& weight) {
    if (decoder.plain) return {x, scratch.quantized};
    if (step.tokens == 1) {
      const Input input = own();
      quantize_row(weight.kind, x, weight.inputs, input.quantized);
      return {x, input.quantized};
    }
    quantize(member, weight.kind, x, step.tokens, weight.inputs, scratch.quantized);
    member.barrier();
    return {x, scratch.quantized};
  }

  // Calls write(group, token, results).
  template <int GROUPS, class Write>
  void project(const BlockWeight& weight, const Input& input, int tokens, Write&& write) {
    if (!decoder.plain) {
      multiply<GROUPS>(member, weight, input.quantized, tokens, write);
    } else {
      member.share(weight.outputs / GROUP / GROUPS, [&](int unit) {
        for (int token = 0; token < tokens; ++token) {
          f8 one[GROUPS];
          for (int g = 0; g < GROUPS; ++g)
            one[g] = plain_product(weight, unit * GROUPS + g, input.rows + static_cast<std::int64_t>(token) * weight.inputs);
          write(unit * GROUPS, token, one);
        }
      });
    }
    member.barrier();
  }

  float* residual(int token) const { return scratch.x + static_cast<std::int64_t>(token) * decoder.hidden; }

  void embed() {
    const int hidden = decoder.hidden;
    member.share(step.tokens, [&](int token) {
      std::memcpy(scratch.x + static_cast<std::int64_t>(token) * hidden,
                  decoder.embedding + static_cast<std::int64_t>(step.token_ids[token]) * hidden,
                  sizeof(float) * static_cast<std::size_t>(hidden));
    });
    member.barrier();
  }

  void place_heads(const DecoderLayer& layer, int token) {
    const auto& shape = layer.attention;
    const int heads = shape.heads, dim = shape.dim, half = decoder.rotated / 2;
    float* qkv = scratch.wide + static_cast<std::int64_t>(token) * (heads + 2 * shape.kv_heads) * dim;
    const std::int64_t position = step.positions[token];
    for (int head = 0; head < heads + shape.kv_heads; ++head) {
      const float* weight = head < heads ? layer.query_norm : layer.key_norm;
      if (weight != nullptr) normalize(qkv + head * dim, weight, dim, decoder.epsilon, qkv + head * dim);
      rotate(qkv + head * dim, decoder.cosines + position * half, decoder.sines + position * half, decoder.rotated);
    }
  }

  void attend(const DecoderLayer& layer) {
    member.share(step.tokens, [&](int token) { place_heads(layer, token); });
    member.barrier();
    attention(member, layer.attention, decoder.paging, step.rows, step.row_count, scratch.wide, scratch.narrow,
              scratch.attention, scratch.attention_floats);
  }

  void add_projection(const BlockWeight& weight, const float* x) {
    const int hidden = decoder.hidden;
    const Input input = quantize_rows(x, weight);
    project<1>(weight, input, step.tokens, [&](int group, int token, const f8 (&result)[1]) {
      float* to = scratch.x + static_cast<std::int64_t>(token) * hidden + group * GROUP;
      store(to, load(to) + result[0] + bias_of(weight, group));
    });
  }

  void mlp(const DecoderLayer& layer) {
    const int intermediate = decoder.intermediate;
    const Input input = norm(step.tokens, layer.mlp_norm, layer.gate_up.kind, [&](int row) { return residual(row); });
    const auto& both = layer.gate_up;
    project<2>(both, input, step.tokens, [&](int group, int token, const f8 (&result)[2]) {
      const f8 gate = result[0] + bias_of(both, group), up = result[1] + bias_of(both, group + 1);
      store(scratch.wide + static_cast<std::int64_t>(token) * intermediate + group / 2 * GROUP,
            gated(gate, up, decoder.gate));
    });
    add_projection(layer.down, scratch.wide);
  }

  void run() {
    embed();
    for (int at = 0; at < decoder.layer_count; ++at) {
      const auto& layer = decoder.layers[at];
      const Input input = norm(step.tokens, layer.attention_norm, layer.qkv.kind, [&](int row) { return residual(row); });
      const std::int64_t width = layer.qkv.outputs;
      project<1>(layer.qkv, input, step.tokens, [&](int group, int token, const f8 (&result)[1]) {
        store(scratch.wide + token * width + group * GROUP, result[0] + bias_of(layer.qkv, group));
      });
      attend(layer);
      add_projection(layer.output, scratch.narrow);
      mlp(layer);
    }
    logits();
  }

  void logits() {
    if (step.wanted_count == 0) return;
    const Input input = norm(step.wanted_count, decoder.last_norm, decoder.head.kind,
                             [&](int row) { return residual(step.wanted[row]); });
    const std::int64_t width = decoder.head.outputs;
    project<1>(decoder.head, input, step.wanted_count, [&](int group, int row, const f8 (&result)[1]) {
      store(step.logits + row * width + group * GROUP, result[0] + bias_of(decoder.head, group));
    });
  }
};

static void forward(Member& member, const Decoder& decoder, const DecoderStep& step, const Scratch& scratch) {
  Pass{member, decoder, step, scratch}.run();
}

}  // namespace STRONGROOM_ISA
}  // namespace strongroom
