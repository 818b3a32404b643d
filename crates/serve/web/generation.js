// One request at a time: sent, waited for when the server is busy, streamed, stopped.
import { Lost, Refused, stream } from "./api.js";
import { TextBuilder } from "./texts.js";
import { Store } from "./store.js";

const PATHS = { completion: "/v1/completions", chat: "/v1/chat/completions" };

/** The page is drawn again at most so often while text arrives, in milliseconds. */
const FRAME = 30;
/** A server that stays busy is asked so many times. */
const TRIES = 20;

export class Generation {
    /** `phase` is idle, sending, waiting (until `retryAt`, because of `message`) or streaming. */
    status = new Store({ phase: "idle", message: "", retryAt: 0 });
    #abort = null;
    #wake = null;

    get busy() {
        return this.#abort !== null;
    }

    /** Ends the request. The closed connection tells the server, which frees what it held for it. */
    stop() {
        this.#abort?.abort();
    }

    /** Asks a busy server again at once. */
    tryNow() {
        this.#wake?.();
    }

    /**
     * Sends a request. `changed` gets the texts so far, now and then. Returns `{ texts, usage, outcome, error, times }` with
     * the outcome done, stopped, lost or failed; `times` are those of sending and of the first and last token.
     */
    async run(kind, body, changed) {
        this.stop();
        const abort = new AbortController();
        this.#abort = abort;
        const set = (changes) => this.#abort === abort && this.status.set(changes);
        const result = {
            texts: [],
            usage: null,
            outcome: "done",
            error: null,
            times: { sent: 0, first: 0, last: 0 },
        };
        try {
            for (let tries = 1; ; tries += 1) {
                set({ phase: "sending" });
                try {
                    await this.#stream(kind, body, abort.signal, result, changed, set);
                    break;
                } catch (error) {
                    const again =
                        error instanceof Refused &&
                        error.retryAfter !== null &&
                        [429, 503].includes(error.status);
                    if (!again || result.texts.length || tries === TRIES) throw error;
                    set({
                        phase: "waiting",
                        message: error.message,
                        retryAt: Date.now() + 1000 * error.retryAfter,
                    });
                    await this.#wait(1000 * error.retryAfter, abort.signal);
                }
            }
        } catch (error) {
            if (abort.signal.aborted) result.outcome = "stopped";
            else {
                result.outcome = error instanceof Lost ? "lost" : "failed";
                result.error = error;
            }
        }
        result.texts = result.texts.map((text) => ({ ...text, finish: text.finish ?? result.outcome }));
        set({ phase: "idle", message: "" });
        if (this.#abort === abort) this.#abort = null;
        return result;
    }

    async #stream(kind, body, signal, result, changed, set) {
        let timer = null;
        const builders = [];
        const show = () => {
            timer = null;
            changed(result.texts);
        };
        result.times.sent = performance.now();
        try {
            for await (const event of stream(PATHS[kind], body, signal)) {
                for (const choice of event.choices) {
                    const index = choice.index;
                    while (builders.length <= index) builders.push(new TextBuilder(kind));
                    builders[index].add(choice);
                    if (choice.text || choice.delta?.content) {
                        result.times.last = performance.now();
                        result.times.first ||= result.times.last;
                    }
                }
                result.texts = builders.map(({ value }) => value);
                result.usage = event.usage ?? result.usage;
                set({ phase: "streaming" });
                timer ??= setTimeout(show, FRAME);
            }
        } finally {
            clearTimeout(timer);
        }
    }

    #wait(milliseconds, signal) {
        return new Promise((resolve, reject) => {
            const timer = setTimeout(resolve, milliseconds);
            this.#wake = () => {
                clearTimeout(timer);
                resolve();
            };
            signal.addEventListener("abort", () => {
                clearTimeout(timer);
                reject(signal.reason);
            });
        });
    }
}

/** How it went, in a line: tokens, their rate, and the time to the first. */
export function figures({ usage, times, texts, outcome }) {
    const parts = [];
    const tokens = usage?.completion_tokens ?? texts.reduce((sum, text) => sum + text.tokens.length, 0);
    if (tokens) parts.push(`${tokens} tokens`);
    const seconds = (times.last - times.first) / 1000;
    if (tokens > 1 && seconds > 0.005)
        parts.push(`${((tokens - 1) / seconds).toFixed(tokens / seconds < 10 ? 1 : 0)} tokens/s`);
    if (times.first) parts.push(`first after ${duration((times.first - times.sent) / 1000)}`);
    if (outcome === "stopped") parts.push("stopped");
    if (outcome === "lost") parts.push("connection lost");
    return parts.join(" · ");
}

/** Seconds as people read them. */
export function duration(seconds) {
    if (seconds === 0) return "0";
    if (seconds < 0.001) return `${(seconds * 1e6).toFixed(0)} µs`;
    if (seconds < 1) return `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
    return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
}
