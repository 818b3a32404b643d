// Texts as they arrive: their tokens, probabilities and ends. Nothing here touches the page.

/** A text without anything in it. A token is `{ text, logprob, top: [{ name, logprob }] }`. */
export const emptyText = () => ({ text: "", tokens: [], finish: null });

/**
 * Adds a choice of a completion's event to a text. What a token shows is cut from the text by the offsets, so that
 * characters of several tokens and stop strings come out right.
 */
export function addCompletion(text, choice) {
    const whole = text.text + (choice.text ?? "");
    const tokens = text.tokens.slice();
    const given = choice.logprobs;
    given?.tokens?.forEach((name, i) => {
        const top = Object.entries(given.top_logprobs?.[i] ?? {}).map(([name, logprob]) => ({ name, logprob }));
        top.sort((a, b) => b.logprob - a.logprob);
        tokens.push({ name, text: "", logprob: given.token_logprobs[i], top, offset: given.text_offset[i] });
    });
    if (tokens.length) cut(whole, tokens, Math.max(0, text.tokens.length - 1));
    return { text: whole, tokens, finish: choice.finish_reason ?? text.finish };
}

/** Sets what the tokens from `first` on show. */
function cut(whole, tokens, first) {
    // Offsets count characters, a JavaScript string counts pairs of bytes.
    let [unit, character] = [0, 0];
    const unitOf = (wanted) => {
        for (; character < wanted && unit < whole.length; character += 1) unit += whole.codePointAt(unit) > 0xffff ? 2 : 1;
        return unit;
    };
    const base = tokens[0].offset;
    let begin = unitOf(tokens[first].offset - base);
    for (let i = first; i < tokens.length; i += 1) {
        const end = i + 1 < tokens.length ? unitOf(tokens[i + 1].offset - base) : whole.length;
        const text = whole.slice(begin, end);
        if (tokens[i].text !== text || tokens[i].begin !== begin) tokens[i] = { ...tokens[i], text, begin };
        begin = end;
    }
}

/** Adds a choice of a conversation's event to a text. */
export function addChat(text, choice) {
    const whole = text.text + (choice.delta?.content ?? "");
    const tokens = (choice.logprobs?.content ?? []).map(({ token, logprob, top_logprobs }) => ({
        name: token,
        text: token,
        logprob,
        top: (top_logprobs ?? []).map(({ token, logprob }) => ({ name: token, logprob })),
    }));
    return { text: whole, tokens: [...text.tokens, ...tokens], finish: choice.finish_reason ?? text.finish };
}

/** Whether a token's name stands for bytes that are no whole characters. */
export const isPart = (name) => name.startsWith("bytes:\\x");

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
    return { stop: "ended by itself or at a stop string", length: "reached the most tokens", stopped: "stopped by you", lost: "connection lost", failed: "failed" }[finish] ?? finish;
}
