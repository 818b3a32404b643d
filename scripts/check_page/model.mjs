// Writes a Hugging Face folder of a small OPT with random weights: large enough to take its time, small enough to be made
// in seconds. What it writes is no language, in several scripts, with characters cut between tokens.
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const TOKENIZER = new URL("../../crates/data/tests/fixtures/tokenizer/small/", import.meta.url).pathname;
const [WIDTH, LAYERS, HEADS, POSITIONS] = [384, 6, 6, 2048];

export function makeModel(folder) {
    mkdirSync(folder, { recursive: true });
    for (const name of ["vocab.json", "merges.txt"]) copyFileSync(join(TOKENIZER, name), join(folder, name));
    const vocab = Object.keys(JSON.parse(readFileSync(join(folder, "vocab.json"), "utf8"))).length;
    writeFileSync(
        join(folder, "config.json"),
        JSON.stringify({
            architectures: ["OPTForCausalLM"],
            model_type: "opt",
            activation_function: "relu",
            do_layer_norm_before: true,
            hidden_size: WIDTH,
            word_embed_proj_dim: WIDTH,
            ffn_dim: 4 * WIDTH,
            num_hidden_layers: LAYERS,
            num_attention_heads: HEADS,
            max_position_embeddings: POSITIONS,
            vocab_size: vocab,
            tie_word_embeddings: true,
            enable_bias: true,
            layer_norm_elementwise_affine: true,
            _remove_final_layer_norm: false,
            dropout: 0,
            attention_dropout: 0,
            layerdrop: 0,
            bos_token_id: 2,
            eos_token_id: 2,
            pad_token_id: 1,
            init_std: 0.02,
            torch_dtype: "bfloat16",
        }),
    );
    writeFileSync(join(folder, "model.safetensors"), safetensors(tensors(vocab)));
}

/** Names, shapes and standard deviations; those without one are 1 for weights and 0 for biases. */
function tensors(vocab) {
    const C = WIDTH;
    const list = [
        ["embed_tokens.weight", [vocab, C], 0.14],
        ["embed_positions.weight", [POSITIONS + 2, C], 0.2],
    ];
    const pair = (name, shape, deviation) =>
        list.push([`${name}.weight`, shape, deviation], [`${name}.bias`, [shape[0]]]);
    for (let layer = 0; layer < LAYERS; layer += 1) {
        for (const one of ["q", "k", "v", "out"]) pair(`layers.${layer}.self_attn.${one}_proj`, [C, C], 0.06);
        pair(`layers.${layer}.self_attn_layer_norm`, [C]);
        pair(`layers.${layer}.fc1`, [4 * C, C], 0.06);
        pair(`layers.${layer}.fc2`, [C, 4 * C], 0.06);
        pair(`layers.${layer}.final_layer_norm`, [C]);
    }
    pair("final_layer_norm", [C]);
    return list.map(([name, shape, deviation]) => ({ name: `model.decoder.${name}`, shape, deviation }));
}

function safetensors(tensors) {
    const header = {};
    let end = 0;
    for (const { name, shape } of tensors) {
        const begin = end;
        end += 2 * shape.reduce((a, b) => a * b);
        header[name] = { dtype: "BF16", shape, data_offsets: [begin, end] };
    }
    const text = Buffer.from(JSON.stringify(header));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(text.length));
    const values = new Uint16Array(end / 2);
    const random = normal(1);
    let at = 0;
    for (const { name, shape, deviation } of tensors) {
        const count = shape.reduce((a, b) => a * b);
        const constant = name.endsWith(".weight") ? 1 : 0;
        for (let i = 0; i < count; i += 1)
            values[at + i] = bfloat16(deviation ? deviation * random() : constant);
        at += count;
    }
    return Buffer.concat([length, text, Buffer.from(values.buffer)]);
}

const float = new Float32Array(1);
const bits = new Uint32Array(float.buffer);

/** The upper half of a float's bits. */
function bfloat16(value) {
    float[0] = value;
    return bits[0] >>> 16;
}

/** Nearly normal numbers, the same for the same seed: sums of four even ones. */
function normal(seed) {
    let state = seed;
    const even = () => {
        // Marsaglia's xorshift.
        state ^= state << 13;
        state ^= state >>> 17;
        state ^= state << 5;
        return (state >>> 0) / 2 ** 32;
    };
    return () => (even() + even() + even() + even() - 2) * Math.sqrt(3);
}
