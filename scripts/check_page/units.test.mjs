// The page's modules that need no browser. Run by scripts/check-page.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import test from "node:test";
import { asCurl, asPython, literal, quoted } from "../../crates/serve/web/commands.js";
import {
    DEFAULTS,
    WrongField,
    controlOf,
    readBias,
    readSettings,
    readStop,
} from "../../crates/serve/web/fields.js";
import { buckets, grown, parse, quantile, rate, total } from "../../crates/serve/web/prometheus.js";
import { EventParser, events } from "../../crates/serve/web/sse.js";
import { TextBuilder, hasNoWidth, percent, shade, shown } from "../../crates/serve/web/texts.js";
import { point } from "../../crates/serve/web/watch.js";

const STREAM =
    '\uFEFFdata: {"a":1}\r\n\r\n: still at work\n\nevent: x\ndata: two\ndata:lines\nid: 7\n\ndata\n\ndata: [DONE]\r\r';

test("events are the same in whatever pieces a stream comes", async () => {
    const expected = ['{"a":1}', "two\nlines", "", "[DONE]"];
    for (let first = 0; first <= STREAM.length; first += 1) {
        for (const second of [first, first + 1, first + 3]) {
            const parser = new EventParser();
            const pieces = [STREAM.slice(0, first), STREAM.slice(first, second), STREAM.slice(second), "\n"];
            assert.deepEqual(
                pieces.flatMap((piece) => parser.push(piece)),
                expected,
                `cut at ${first} and ${second}`,
            );
        }
    }
    const bytes = new TextEncoder().encode("data: é狐🦊\n\n");
    const stream = new ReadableStream({
        start(to) {
            for (const byte of bytes) to.enqueue(new Uint8Array([byte]));
            to.close();
        },
    });
    const all = [];
    for await (const data of events(stream)) all.push(data);
    assert.deepEqual(all, ["é狐🦊"]);
});

test("an event that never ends is none", () => {
    assert.deepEqual(new EventParser().push("data: half"), []);
    assert.deepEqual(new EventParser().push("data: half\n"), []);
});

const METRICS = `# HELP x what "it" is
# TYPE x counter
x_total{model="a",path="C:\\\\d\\"q\\"\\nz}"} 4 1700000000
x_total{model="b",} 2e1
up 1
odd NaN
most +Inf
broken{model="a" 3
t_bucket{le="0.1",model="a"} 2
t_bucket{le="1.0",model="a"} 8 # {trace="z"} 0.5
t_bucket{le="+Inf",model="a"} 10
t_bucket{le="0.1",model="b"} 0
t_bucket{le="1.0",model="b"} 0
t_bucket{le="+Inf",model="b"} 0
# EOF
`;

test("metrics are read", () => {
    const samples = parse(METRICS);
    assert.equal(samples.get("x_total")[0].labels.path, 'C:\\d"q"\nz}');
    assert.equal(total(samples, "x_total"), 24);
    assert.equal(
        total(samples, "x_total", ({ model }) => model === "b"),
        20,
    );
    assert.equal(total(samples, "nothing"), null);
    assert.equal(total(samples, "most"), Infinity);
    assert.ok(Number.isNaN(total(samples, "odd")));
    assert.equal(samples.has("broken"), false);
    assert.deepEqual(buckets(samples, "t"), [
        [0.1, 2],
        [1, 8],
        [Infinity, 10],
    ]);
});

test("quantiles and rates", () => {
    const counts = [
        [0.1, 2],
        [1, 8],
        [Infinity, 10],
    ];
    assert.equal(quantile(0.1, counts), 0.05);
    assert.ok(Math.abs(quantile(0.5, counts) - 0.55) < 1e-12);
    assert.equal(quantile(0.99, counts), 1);
    assert.equal(
        quantile(0.5, [
            [1, 0],
            [Infinity, 0],
        ]),
        null,
    );
    assert.equal(quantile(0.5, []), null);
    assert.deepEqual(
        grown(
            [
                [1, 3],
                [Infinity, 4],
            ],
            [
                [1, 5],
                [Infinity, 9],
            ],
        ),
        [
            [1, 2],
            [Infinity, 5],
        ],
    );
    assert.deepEqual(
        grown(
            [
                [1, 3],
                [Infinity, 4],
            ],
            [
                [1, 1],
                [Infinity, 2],
            ],
        ),
        [
            [1, 1],
            [Infinity, 2],
        ],
        "after a restart",
    );
    assert.equal(rate(10, 30, 4), 5);
    assert.equal(rate(10, 4, 4), 1, "after a restart");
    assert.equal(rate(null, 4, 4), null);
    assert.equal(rate(1, 4, 0), null);
});

test("points of the curves", () => {
    const page = (tokens, fast) =>
        parse(`ferropt_generated_tokens_total{model="a"} ${tokens}
ferropt_generated_tokens_total{model="b"} 5
ferropt_cache_pages{model="a"} 50
ferropt_cache_pages_used{model="a"} 10
ferropt_running{model="a"} 3
ferropt_inter_token_seconds_bucket{model="a",le="0.01"} ${fast}
ferropt_inter_token_seconds_bucket{model="a",le="+Inf"} ${fast}`);
    const now = point({ at: 100, samples: page(10, 4) }, { at: 104, samples: page(50, 44) });
    assert.equal(now.generated, 10);
    assert.equal(now.cache, 20);
    assert.equal(now.running, 3);
    assert.equal(now.between50, 0.005);
    assert.equal(now.first50, null);
    assert.equal(now.waiting, null);
});

// Everything that a shell or Python could take for something else.
const NASTY = [
    `it's`,
    `"double" \\ back\\n`,
    "$HOME `id` $(id) !x",
    "line\nend\ttab",
    "é狐🦊 \u2028",
    "'; rm -rf x; '",
    "@file",
    "\u0001\u007f",
    "",
];

test("a shell gives curl what was meant", () => {
    for (const text of NASTY) {
        const body = { model: "m", prompt: text, stop: ["'", text || "x"], temperature: 0.5 };
        const command = asCurl("http://127.0.0.1:8000", "completion", body, true);
        const script = `curl() { for word; do printf '%s\\0' "$word"; done; }\n${command}`;
        const env = { ...process.env, FERROPT_API_KEY: "fo-'1" };
        const words = execFileSync("sh", ["-c", script], { encoding: "utf8", env }).split("\0");
        assert.equal(words[0], "http://127.0.0.1:8000/v1/completions");
        assert.deepEqual(words.slice(1, 5), [
            "-H",
            "Content-Type: application/json",
            "-H",
            "Authorization: Bearer fo-'1",
        ]);
        assert.deepEqual(JSON.parse(words[6]), body);
    }
    assert.equal(quoted("plain/word"), "plain/word");
    assert.equal(quoted("a b"), "'a b'");
});

test("Python reads what was meant", () => {
    const value = {
        texts: NASTY,
        flags: [true, false, null],
        numbers: [1, -0.5, 1e-7, 1e21],
        nested: { 1: -100 },
    };
    const program = "import ast, json, sys; print(json.dumps(ast.literal_eval(sys.stdin.read())))";
    const read = execFileSync("python3", ["-c", program], { input: literal(value), encoding: "utf8" });
    assert.deepEqual(JSON.parse(read), value);
});

test("the openai package gets its own fields as arguments, others beside them", () => {
    const program = asPython("http://h", "completion", { model: "m", prompt: "p", top_k: 4, seed: 1 }, false);
    assert.match(program, /\n    seed=1,\n    extra_body=\{"top_k": 4\},\n/);
    assert.match(program, /api_key="none"/);
    const chat = asPython(
        "http://h",
        "chat",
        { model: "m", messages: [], top_logprobs: 3, min_p: 0.1 },
        true,
    );
    assert.match(chat, /chat\.completions\.create/);
    assert.match(chat, /top_logprobs=3/);
    assert.match(chat, /os\.environ\["FERROPT_API_KEY"\]/);
    execFileSync("python3", ["-c", "import ast, sys; ast.parse(sys.stdin.read())"], { input: chat });
});

test("controls become fields", async () => {
    const read = (changes, kind = "completion") =>
        readSettings({ ...DEFAULTS, ...changes }, kind, async (text) => text.length);
    assert.deepEqual(await read({}), { max_tokens: 64, logprobs: 5 });
    assert.deepEqual(await read({ logprobs: "", max_tokens: "8", top_p: "0.5", temperature: "1.0" }), {
        max_tokens: 8,
        top_p: 0.5,
    });
    assert.deepEqual(await read({ greedy: true, top_p: 0.5, top_k: 4, logprobs: "" }), {
        max_tokens: 64,
        temperature: 0,
    });
    assert.deepEqual(await read({ stop: "a\\nb\n\n c" }), {
        max_tokens: 64,
        logprobs: 5,
        stop: ["a\nb", " c"],
    });
    assert.deepEqual(await read({ logit_bias: '5: -100\n" the" = 2.5' }), {
        max_tokens: 64,
        logprobs: 5,
        logit_bias: { 5: -100, 4: 2.5 },
    });
    assert.deepEqual(await read({}, "chat"), { max_tokens: 64, logprobs: true, top_logprobs: 5 });
    assert.deepEqual(await read({ length_penalty: 2 }), { max_tokens: 64, logprobs: 5 });
    assert.deepEqual(await read({ length_penalty: 2, beams: 3 }), {
        max_tokens: 64,
        beams: 3,
        length_penalty: 2,
        logprobs: 5,
    });
    for (const [changes, field] of [
        [{ top_p: "1.5" }, "top_p"],
        [{ max_tokens: "many" }, "max_tokens"],
        [{ n: "1.5" }, "n"],
        [{ logit_bias: "the: 1" }, "logit_bias"],
        [{ logit_bias: "5: 101" }, "logit_bias"],
    ]) {
        await assert.rejects(
            read(changes),
            (error) => error instanceof WrongField && error.field === field,
            field,
        );
    }
    assert.deepEqual(readStop("\\\\n"), ["\\n"]);
    assert.deepEqual(readBias(' "\\"" : 1'), [{ text: '"', bias: 1 }]);
    assert.equal(controlOf("top_logprobs"), "logprobs");
    assert.equal(controlOf("model"), null);
});

const event = (text, tokens, finish = null) => ({
    text,
    finish_reason: finish,
    logprobs: {
        tokens,
        token_logprobs: tokens.map(() => -1),
        top_logprobs: tokens.map((name) => ({ [name]: -1, other: -0.5 })),
        text_offset: [],
    },
});
const shownBy = ({ value }) => value.tokens.map(({ text }) => text);

test("tokens show their part of the text", () => {
    // A character beyond 16 bits, one in two tokens, a token that is no text, and a stop string that ends the text in one.
    const text = new TextBuilder("completion");
    text.add(event("a🦊", ["a", "🦊"]));
    text.add(event("", ["bytes:\\xc3"]));
    assert.deepEqual(shownBy(text), ["a", "🦊", ""]);
    text.add(event("é", ["bytes:\\xa9", "<pad>"]));
    text.add(event(" e", [" ending"]));
    assert.deepEqual(shownBy(text), ["a", "🦊", "", "é", "", " e"]);
    text.add(event("nd", []));
    text.add(event("", [], "stop"));
    assert.deepEqual(shownBy(text), ["a", "🦊", "", "é", "", " end"]);
    assert.equal(text.value.text, "a🦊é end");
    assert.equal(text.value.finish, "stop");
    assert.deepEqual(
        text.value.tokens[0].top.map(({ name }) => name),
        ["other", "a"],
    );
});

test("bytes that are no characters, and an end within one", () => {
    const text = new TextBuilder("completion");
    text.add(event("�a", ["bytes:\\x80", "a"]));
    text.add(event("", ["bytes:\\xe2\\x80"]));
    assert.deepEqual(shownBy(text), ["�", "a", ""]);
    text.add(event("�b", ["b"]));
    text.add(event("", ["bytes:\\xe2"]));
    text.add(event("�", []));
    text.add(event("", [], "length"));
    assert.deepEqual(shownBy(text), ["�", "a", "", "�b", "�"]);
    assert.equal(shownBy(text).join(""), text.value.text);
});

test("texts that take no room", () => {
    for (const text of ["\u0301", "\u05c4", "\u200b", "\ufe0f", "\u0001", "\u00ad", "\u115f"]) {
        assert.ok(hasNoWidth(text), JSON.stringify(text));
    }
    for (const text of ["", " ", "\n", "\t", "a", "a\u0301", "é", "\ufffd"]) {
        assert.ok(!hasNoWidth(text), JSON.stringify(text));
    }
});

test("without log-probabilities there are no tokens", () => {
    const text = new TextBuilder("completion");
    text.add({ text: "x", logprobs: null });
    assert.deepEqual(text.value, { text: "x", tokens: [], finish: null });
});

test("a token that did not change stays the same object", () => {
    const text = new TextBuilder("completion");
    text.add(event("a b", ["a", " b"]));
    const before = text.value;
    text.add(event(" c", [" c"]));
    assert.equal(text.value.tokens[0], before.tokens[0]);
    assert.equal(text.value.tokens[1], before.tokens[1]);
});

test("replies of a conversation", () => {
    const text = new TextBuilder("chat");
    const piece = (content, token) => ({
        delta: { content },
        logprobs: { content: [{ token, logprob: -2, top_logprobs: [{ token, logprob: -2 }] }] },
    });
    text.add({ delta: { role: "assistant", content: "" } });
    text.add(piece("", " "));
    text.add(piece("Hi", " Hi"));
    text.add(piece(" you", " you"));
    assert.equal(text.value.text, "Hi you");
    assert.deepEqual(shownBy(text), ["", "Hi", " you"]);
    assert.equal(text.value.tokens[1].name, " Hi");
    text.add({ delta: {}, finish_reason: "length" });
    assert.equal(text.value.finish, "length");
});

test("probabilities in words", () => {
    assert.deepEqual([0, -0.5, -1, -2, -9, null].map(shade), [0, 1, 2, 3, 4, null]);
    assert.deepEqual([0, Math.log(0.123), Math.log(0.01234), -20, null].map(percent), [
        "100 %",
        "12.3 %",
        "1.23 %",
        "<0.01 %",
        "unknown",
    ]);
    assert.equal(shown(" a\n"), "␣a↵");
    assert.equal(shown("bytes:\\xe2\\x80"), "e2 80");
});
