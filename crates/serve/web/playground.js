// The playground: a prompt, the texts that follow it, and going on from any token of them.
import { getJson, Refused } from "./api.js";
import { Generation, figures } from "./generation.js";
import { WrongField, controlOf, readSettings } from "./fields.js";
import { newId, remember } from "./history.js";
import { findModels, models } from "./models.js";
import { announce, notice } from "./notices.js";
import { blame, settings } from "./settings.js";
import { Store, keep, recall } from "./store.js";
import { emptyText } from "./texts.js";

/** `runs` are the versions of what follows the prompt, `shown` is the one that is looked at. `wrong` is about the prompt. */
export const playground = new Store({
    prompt: recall("sessionStorage", "prompt", ""),
    runs: [],
    shown: 0,
    wrong: null,
});
export const generation = new Generation();

export function setPrompt(prompt) {
    keep("sessionStorage", "prompt", prompt);
    playground.set({ prompt, wrong: null });
}

/** The version that is looked at. */
export const shownRun = () => playground.value.runs[playground.value.shown];

export function show(index) {
    playground.set({ shown: Math.max(0, Math.min(playground.value.runs.length - 1, index)) });
}

/** Opens an entry of the history. */
export function open(run) {
    generation.stop();
    setPrompt(run.prompt);
    playground.set({ runs: [run], shown: 0 });
}

/** What is not text yet: nothing was kept. */
const NOTHING = { text: "", tokens: [] };

/**
 * Continues the prompt that is written, or that of an earlier version, which may be another one by now, with what of that
 * version's text is `kept`.
 */
export async function generate(kept = NOTHING, prompt = playground.value.prompt) {
    if (prompt + kept.text === "") {
        playground.set({ wrong: "Write something for the model to continue." });
        document.getElementById("prompt")?.focus();
        return;
    }
    const body = await readBody("completion", (fields) => ({ prompt: prompt + kept.text, ...fields }));
    if (!body) return;
    // Versions of another prompt are in the history.
    const runs = playground.value.runs.filter((run) => run.prompt === prompt);
    const run = {
        id: newId(),
        at: Date.now(),
        kind: "completion",
        model: body.model,
        prompt,
        kept,
        body,
        texts: [emptyText()],
        figures: "",
    };
    playground.set({ runs: [...runs, run], shown: runs.length, wrong: null });
    const update = (changes) => {
        Object.assign(run, changes);
        playground.set({
            runs: playground.value.runs.map((other) => (other.id === run.id ? { ...run } : other)),
        });
    };
    announce("Generating.");
    const result = await generation.run("completion", body, (texts) => update({ texts }));
    update({ texts: result.texts, figures: figures(result) });
    if (result.texts.some(({ text }) => text)) remember({ ...run });
    else {
        playground.set({ runs: playground.value.runs.filter(({ id }) => id !== run.id) });
        show(playground.value.shown);
    }
    report(
        result,
        () => generate(kept, prompt),
        () => proceed(0),
        (wrong) => playground.set({ wrong }),
    );
}

/**
 * The body of a request from the controls, or nothing when a control is wrong, which says so. `rest` adds what is not in
 * the controls.
 */
export async function readBody(kind, rest) {
    blame(null);
    notice(null);
    try {
        const fields = await readSettings(settings.value.values, kind, tokenId);
        return { model: models.value.chosen, ...rest(fields) };
    } catch (error) {
        if (error instanceof WrongField) {
            blame(error.field, error.message);
            announce(error.message);
        } else notice({ message: error.message });
        return null;
    }
}

async function tokenId(text) {
    const { tokens } = await getJson("/tokenize", {
        body: { model: models.value.chosen, prompt: text, add_special_tokens: false },
    });
    if (tokens.length !== 1) {
        throw new WrongField(
            "logit_bias",
            `Logit bias: ${JSON.stringify(text)} is ${tokens.length} tokens (${tokens.join(", ")}), not one.`,
        );
    }
    return tokens[0];
}

/**
 * Tells where it belongs how a request went. `again` tries once more, `goOn`, if it can be done, continues what is there, and
 * `tellPrompt`, where there is a prompt to write, says beside it what is wrong with it.
 */
export function report({ outcome, error, texts, times }, again, goOn, tellPrompt) {
    if (outcome === "done") {
        const text = texts[0]?.text ?? "";
        announce(text.length > 600 ? "Done." : `Done. ${text}`);
    }
    if (outcome === "stopped") announce("Stopped.");
    if (!error) return;
    // The page as a whole asks for a key, and tells that the server is not there.
    if (error.status === 401 || outcome === "lost") findModels();
    if (error.status === 401) return;
    const control = error instanceof Refused ? controlOf(error.param) : null;
    if (control) blame(control, sentence(error.message));
    else if (error.param === "prompt" && tellPrompt) tellPrompt(sentence(error.message));
    else {
        const actions = [{ label: "Try again", run: again }];
        if (goOn && outcome === "lost" && times.first)
            actions.unshift({ label: "Go on from here", run: goOn });
        const kept = outcome === "lost" && times.first ? " What had arrived is kept." : "";
        notice({ message: sentence(error.message) + kept, field: error.param, actions });
    }
    announce(`Error: ${error.message}`);
}

/** A message of the API as a sentence. What begins with a field's name stays as it is. */
function sentence(text) {
    const begin = /^\w+(_| =|:)/.test(text) ? text.charAt(0) : text.charAt(0).toUpperCase();
    return begin + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

/** All tokens of a text, with those that were kept from an earlier version; none when some of them are not known. */
export function tokensOf(run, choice) {
    const tokens = [...run.kept.tokens, ...(run.texts[choice]?.tokens ?? [])];
    const length = tokens.reduce((sum, { text }) => sum + text.length, 0);
    return length === textOf(run, choice).length ? tokens : [];
}

export const textOf = (run, choice) => run.kept.text + (run.texts[choice]?.text ?? "");

/** What is before a token. */
function before(run, choice, place) {
    const tokens = tokensOf(run, choice)
        .slice(0, place)
        .map((token) => ({ ...token, kept: true }));
    return { text: tokens.map(({ text }) => text).join(""), tokens };
}

/** Goes on with another token in the place of one. */
export function branch(run, choice, place, name) {
    const kept = before(run, choice, place);
    const { top } = tokensOf(run, choice)[place];
    const token = {
        name,
        text: name,
        top,
        logprob: top.find((other) => other.name === name)?.logprob ?? null,
        kept: true,
    };
    generate({ text: kept.text + name, tokens: [...kept.tokens, token] }, run.prompt);
}

/** Goes on from a token, which is chosen anew. */
export const regenerate = (run, choice, place) => generate(before(run, choice, place), run.prompt);

/** Continues a text: from a token, or from its end. */
export function proceed(choice, place, run = shownRun()) {
    const whole = {
        text: textOf(run, choice),
        tokens: tokensOf(run, choice).map((token) => ({ ...token, kept: true })),
    };
    generate(place === undefined ? whole : before(run, choice, place + 1), run.prompt);
}

/** Makes a text a part of the prompt. */
export function adopt(choice, run = shownRun()) {
    setPrompt(run.prompt + textOf(run, choice));
    playground.set({ runs: [], shown: 0 });
    document.getElementById("prompt")?.focus();
}
