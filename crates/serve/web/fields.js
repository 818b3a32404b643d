// The controls: each field of a request that a person may set, once. `value` is what it starts with, which is also what
// the API takes for it, except where `sent` says that it is sent anyway.

const number = (name, label, hint, min, max, step, value, more) => ({
    name,
    label,
    hint,
    kind: "number",
    min,
    max,
    step,
    value,
    ...more,
});
const whole = (name, label, hint, min, max, value, more) =>
    number(name, label, hint, min, max, 1, value, { whole: true, ...more });
const flag = (name, label, hint, more) => ({ name, label, hint, kind: "flag", value: false, ...more });
const text = (name, label, hint, more) => ({ name, label, hint, kind: "text", value: "", ...more });

/** Groups of controls, in order. `slider` is the part of the range that people use; `open` groups are shown at first. */
export const GROUPS = [
    {
        title: "Text",
        open: true,
        fields: [
            whole("max_tokens", "Most tokens", "Tokens to generate at most.", 0, 2 ** 31, 64, {
                sent: true,
                slider: [1, 512],
            }),
            text(
                "stop",
                "Stop strings",
                "A text ends before the first of them. One on each line; \\n stands for a new line.",
                { rows: 2 },
            ),
        ],
    },
    {
        title: "Sampling",
        open: true,
        fields: [
            flag("greedy", "Greedy", "Always takes the likeliest token: temperature 0.", { local: true }),
            number(
                "temperature",
                "Temperature",
                "Divides the logits: lower is safer, higher is wilder.",
                0,
                100,
                0.05,
                1,
                { slider: [0, 2], sampling: true },
            ),
            number(
                "top_p",
                "Top-p",
                "Only the likeliest tokens that together have this probability.",
                0,
                1,
                0.01,
                1,
                { slider: [0, 1], sampling: true },
            ),
            whole("top_k", "Top-k", "Only so many of the likeliest tokens; 0 is all.", -1, 2 ** 31, 0, {
                slider: [0, 100],
                sampling: true,
            }),
            number(
                "min_p",
                "Min-p",
                "Only tokens at least this share as likely as the likeliest.",
                0,
                1,
                0.01,
                0,
                { slider: [0, 1], sampling: true },
            ),
            whole(
                "seed",
                "Seed",
                "The same seed gives the same text. Random when empty.",
                Number.MIN_SAFE_INTEGER,
                Number.MAX_SAFE_INTEGER,
                "",
                {},
            ),
        ],
    },
    {
        title: "Penalties",
        fields: [
            number(
                "repetition_penalty",
                "Repetition",
                "Above 1: tokens of prompt and text are less likely to come again.",
                0.01,
                100,
                0.01,
                1,
                { slider: [0.5, 2] },
            ),
            number(
                "presence_penalty",
                "Presence",
                "Taken off the logits of tokens that were generated.",
                -2,
                2,
                0.1,
                0,
                { slider: [-2, 2] },
            ),
            number(
                "frequency_penalty",
                "Frequency",
                "Taken off for each time that a token was generated.",
                -2,
                2,
                0.1,
                0,
                { slider: [-2, 2] },
            ),
            text(
                "logit_bias",
                "Logit bias",
                'One on each line: a token id or a text in quotes, a colon, a number from -100 to 100. For instance " the": -5',
                { rows: 2 },
            ),
        ],
    },
    {
        title: "Several texts",
        completion: true,
        fields: [
            whole("n", "Texts", "Texts to give back.", 1, 128, 1, { slider: [1, 8] }),
            whole(
                "best_of",
                "Best of",
                "Compute so many, give back those with the highest mean log-probability.",
                1,
                128,
                "",
                {},
            ),
            whole(
                "beams",
                "Beams",
                "Search for the likeliest text with so many candidates. Goes without sampling.",
                1,
                128,
                "",
                {},
            ),
            number(
                "length_penalty",
                "Length penalty",
                "With beams: above 0 favours longer texts.",
                -100,
                100,
                0.1,
                1,
                { needs: "beams" },
            ),
        ],
    },
    {
        title: "More",
        fields: [
            whole(
                "logprobs",
                "Alternatives",
                "So many of the likeliest tokens at each place; empty shows no probabilities.",
                0,
                100,
                5,
                { sent: true, slider: [0, 20] },
            ),
            whole(
                "min_tokens",
                "Least tokens",
                "So many tokens come before the text may end.",
                0,
                2 ** 31,
                0,
                {},
            ),
            flag("ignore_eos", "Ignore the end", "The end of the text is never chosen."),
        ],
    },
];

export const FIELDS = GROUPS.flatMap((group) => group.fields);

/** What the controls start with. */
export const DEFAULTS = Object.fromEntries(FIELDS.map(({ name, value }) => [name, value]));

/** A setting is wrong. */
export class WrongField extends Error {
    constructor(field, message) {
        super(message);
        this.field = field;
    }
}

/** A number that was typed, or null for nothing. */
function readNumber({ name, label, min, max, whole }, value) {
    if (value === "" || value === null || value === undefined) return null;
    const read = Number(value);
    const kind = whole ? "a whole number" : "a number";
    if (!Number.isFinite(read) || (whole && !Number.isSafeInteger(read)))
        throw new WrongField(name, `${label}: ${value} is not ${kind}.`);
    if (read < min || read > max)
        throw new WrongField(name, `${label}: ${value} is not ${kind} from ${min} to ${max}.`);
    return read;
}

/** The stop strings of a field with one on each line. */
export function readStop(lines) {
    const escapes = { n: "\n", t: "\t", r: "\r", "\\": "\\" };
    return lines
        .split("\n")
        .filter((line) => line !== "")
        .map((line) => line.replace(/\\([ntr\\])/g, (_, c) => escapes[c]));
}

/** The biases of a field with one on each line: `{ id or text, bias }`. */
export function readBias(lines) {
    return lines
        .split("\n")
        .filter((line) => line.trim() !== "")
        .map((line) => {
            const match = /^\s*(?:(\d+)|"((?:[^"\\]|\\.)*)")\s*[:=]\s*(\S+)\s*$/.exec(line);
            const bias = Number(match?.[3] ?? NaN);
            if (!match || !(bias >= -100 && bias <= 100)) {
                throw new WrongField(
                    "logit_bias",
                    `Logit bias: “${line.trim()}” is not a token and a number from -100 to 100, ` +
                        `such as 50118: -100 or " the": -5.`,
                );
            }
            if (match[1] !== undefined) return { id: match[1], bias };
            const escapes = { n: "\n", t: "\t", r: "\r" };
            return { text: match[2].replace(/\\(.)/g, (_, c) => escapes[c] ?? c), bias };
        });
}

/**
 * The fields of a request's body. `tokenId` gives the id of a text that is one token. Fields that have the API's own
 * default are left out.
 */
export async function readSettings(settings, kind, tokenId) {
    const body = {};
    for (const field of FIELDS) {
        const given = settings[field.name];
        if (field.local || (field.needs && settings[field.needs] === "")) continue;
        if (settings.greedy && field.sampling) continue;
        if (field.kind === "flag") {
            if (given) body[field.name] = true;
        } else if (field.kind === "number") {
            const value = readNumber(field, given);
            if (value !== null && (field.sent || value !== field.value)) body[field.name] = value;
        }
    }
    if (settings.greedy) body.temperature = 0;
    const stop = readStop(settings.stop);
    if (stop.length) body.stop = stop;
    const biases = readBias(settings.logit_bias);
    if (biases.length) {
        body.logit_bias = {};
        for (const { id, text, bias } of biases) body.logit_bias[id ?? (await tokenId(text))] = bias;
    }
    if (kind === "chat" && "logprobs" in body) {
        body.top_logprobs = body.logprobs;
        body.logprobs = true;
    }
    return body;
}

/** The control that an error of the API is about, if it has one. */
export function controlOf(param) {
    const name =
        param === "top_logprobs" ? "logprobs" : param === "max_completion_tokens" ? "max_tokens" : param;
    return FIELDS.some((field) => field.name === name) ? name : null;
}
