// Texts as they arrive: their tokens, probabilities and ends. Nothing here touches the page.

/**
 * A text without anything in it. A token is `{ name, text, logprob, top: [{ name, logprob }] }`, where `text` is the part of
 * the text that it shows.
 */
export const emptyText = () => ({ text: "", tokens: [], finish: null });

/** Puts a text together from the events of a stream. */
export class TextBuilder {
    /** What is there so far; another object after each event. */
    value = emptyText();
    // Tokens may end within a character, which then belongs to the one that completes it.
    #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    // Where each token's text ends.
    #ends = [];
    #chat;

    constructor(kind) {
        this.#chat = kind === "chat";
    }

    /** Adds a choice of an event. */
    add(choice) {
        const { text, tokens, finish } = this.value;
        const more = this.#chat ? chatTokens(choice) : completionTokens(choice);
        const whole = text + ((this.#chat ? choice.delta?.content : choice.text) ?? "");
        for (const { bytes } of more) {
            let written = this.#decoder.decode(bytes, { stream: true });
            const begin = this.#ends.at(-1) ?? 0;
            // A reply begins behind the spaces.
            if (this.#chat && begin === 0) written = written.trimStart();
            this.#ends.push(begin + written.length);
        }
        const all = [...tokens, ...more.map(({ bytes, ...token }) => ({ ...token, text: "" }))];
        const ended = choice.finish_reason ?? finish;
        // The text may lag behind its tokens, or end within one at a stop string.
        let first = tokens.length;
        while (first > 0 && this.#ends[first - 1] >= text.length) first -= 1;
        // What was left of a character comes at the very end.
        if (ended) first = Math.min(first, Math.max(0, all.length - 1));
        for (let i = first; i < all.length; i += 1) {
            const end = ended && i + 1 === all.length ? whole.length : this.#ends[i];
            const shown = whole.slice(this.#ends[i - 1] ?? 0, end);
            if (all[i].text !== shown) all[i] = { ...all[i], text: shown };
        }
        this.value = { text: whole, tokens: all, finish: ended };
    }
}

function completionTokens({ logprobs }) {
    return (logprobs?.tokens ?? []).map((name, i) => {
        const top = Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([name, logprob]) => ({
            name,
            logprob,
        }));
        top.sort((a, b) => b.logprob - a.logprob);
        return { name, logprob: logprobs.token_logprobs[i], top, bytes: bytesOf(name) };
    });
}

function chatTokens({ logprobs }) {
    const named = ({ token, logprob }) => ({ name: token, logprob });
    return (logprobs?.content ?? []).map((one) => ({
        ...named(one),
        top: (one.top_logprobs ?? []).map(named),
        bytes: bytesOf(one.token),
    }));
}

/** What a token writes. */
function bytesOf(name) {
    if (isSpecial(name)) return new Uint8Array();
    if (isPart(name))
        return Uint8Array.from(name.slice("bytes:\\x".length).split("\\x"), (digits) => parseInt(digits, 16));
    return new TextEncoder().encode(name);
}

/** Whether a token's name stands for bytes that are no whole characters. */
export const isPart = (name) => name.startsWith("bytes:\\x");

/** Whether a text is there but takes no room of its own: marks on other characters, and characters that are not drawn. */
export const hasNoWidth = (text) => /^[\p{M}\p{Cc}\p{Cf}\p{DI}]+$/u.test(text) && !/[\n\t]/.test(text);

/** Whether a token's name is that of a special token, which is no text. */
export const isSpecial = (name) => /^<\/?(s|pad|unk)>$/.test(name);

/** What a token is called on the page: spaces and ends of lines can be seen. */
export function shown(name) {
    if (isPart(name)) return name.slice("bytes:".length).replaceAll("\\x", " ").trim();
    return name.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

/** Five shades from sure to surprising, as in the legend. */
export const SHADES = [
    { from: 0.8, label: "80–100 %" },
    { from: 0.5, label: "50–80 %" },
    { from: 0.2, label: "20–50 %" },
    { from: 0.05, label: "5–20 %" },
    { from: 0, label: "below 5 %" },
];

/** The shade of a log-probability; none for a token without one. */
export function shade(logprob) {
    if (logprob === null || logprob === undefined) return null;
    const p = Math.exp(logprob);
    return SHADES.findIndex(({ from }) => p >= from);
}

/** A probability as people read it. */
export function percent(logprob) {
    if (logprob === null || logprob === undefined) return "unknown";
    const p = 100 * Math.exp(logprob);
    if (p >= 99.95) return "100 %";
    if (p >= 10) return `${p.toFixed(1)} %`;
    if (p >= 0.01) return `${p.toFixed(2)} %`;
    return "<0.01 %";
}

/** Why a text ended, in words. */
export function ending(finish) {
    return (
        {
            stop: "ended by itself or at a stop string",
            length: "reached the most tokens",
            stopped: "stopped by you",
            lost: "connection lost",
            failed: "failed",
        }[finish] ?? finish
    );
}
