// Conversations, through the server's template for base models.
import { CopyButton } from "./dialogs.js";
import { Button, CTRL, html, useEffect, useRef } from "./dom.js";
import { Generation, figures } from "./generation.js";
import { newId, remember } from "./history.js";
import { models } from "./models.js";
import { Notice, Waiting, announce, copyAloud } from "./notices.js";
import { readBody, report } from "./playground.js";
import { SideButtons } from "./side.js";
import { Store, useStore } from "./store.js";
import { emptyText, ending } from "./texts.js";
import { Legend, Tokens } from "./tokens.js";

/** A turn is `{ role, text, tokens, finish, figures }`; those of a person have only the first two. */
const empty = () => ({ id: newId(), system: "", turns: [], draft: "" });
export const chat = new Store(empty());
export const generation = new Generation();

/** Opens an entry of the history. */
export function open({ id, system, turns }) {
    generation.stop();
    chat.set({ ...empty(), id, system, turns });
}

const messages = ({ system, turns }) => [
    ...(system.trim() ? [{ role: "system", content: system }] : []),
    ...turns.map(({ role, text }) => ({ role, content: text })),
];

/** Fields of the controls that a conversation has; it goes on with one text. */
const only = ({ n, best_of, beams, length_penalty, ...fields }) => fields;

/** The server's own introduction of a conversation. */
const INTRODUCTION = "A conversation between a person and a helpful assistant.";

/** Says what was typed. */
function send() {
    const { draft, turns } = chat.value;
    if (draft.trim() === "" || generation.busy) return document.getElementById("draft")?.focus();
    chat.set({ turns: [...turns, { role: "user", text: draft }], draft: "" });
    reply();
}

/** Lets the assistant speak; `old` is a reply that comes back where there is no new one. */
async function reply(old = null) {
    const { id, turns } = chat.value;
    const mine = () => chat.value.id === id;
    const undo = () => (old ? mine() && chat.set({ turns: [...turns, old] }) : back());
    const body = await readBody("chat", (fields) => ({ messages: messages(chat.value), ...only(fields) }));
    if (!body) return undo();
    const turn = (text, more) => ({ role: "assistant", ...text, ...more });
    const update = (text, more) => mine() && chat.set({ turns: [...turns, turn(text, more)] });
    update(emptyText());
    announce("The assistant is replying.");
    const result = await generation.run("chat", body, ([text]) => update(text));
    const [text] = result.texts;
    if (text?.text || (text && result.outcome === "done")) {
        update(text, { figures: figures(result) });
        const { system, turns } = chat.value;
        if (mine()) remember({ id, at: Date.now(), kind: "chat", model: body.model, system, turns });
    } else if (mine()) {
        chat.set({ turns });
        if (result.outcome !== "done") undo();
    }
    report(result, again);
}

/** What was said last comes back to be changed, unless something else is being typed. */
function back() {
    const { turns, draft } = chat.value;
    const last = turns.at(-1);
    if (last?.role === "user" && draft === "") chat.set({ turns: turns.slice(0, -1), draft: last.text });
}

/** Replies once more to what was said last. */
function again() {
    const { turns, draft } = chat.value;
    if (turns.at(-1)?.role !== "assistant") return draft ? send() : undefined;
    const old = turns.at(-1);
    chat.set({ turns: turns.slice(0, -1) });
    reply(old);
}

/** Takes back what was said at a place, and all after it. */
function edit(place) {
    chat.set({ draft: chat.value.turns[place].text, turns: chat.value.turns.slice(0, place) });
    document.getElementById("draft")?.focus();
}

/** Keys of this view. */
export function keys(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        send();
        return true;
    }
    if (event.key === "Escape" && generation.busy) {
        generation.stop();
        return true;
    }
    return false;
}

export function Chat() {
    const value = useStore(chat);
    const { system, turns, draft } = value;
    const { phase } = useStore(generation.status);
    const { chosen } = useStore(models);
    const busy = phase !== "idle";
    const end = useRef(null);
    useEffect(() => end.current?.scrollIntoView({ block: "nearest" }), [turns.length]);
    // What is being typed is a part of the request.
    const said = { system, turns: draft ? [...turns, { role: "user", text: draft }] : turns };
    const isLast = (i) => i === turns.length - 1;
    return html`
        <section class="work chat" aria-label="Conversation">
            <details class="card system" open=${system !== ""}>
                <summary>How the conversation is introduced</summary>
                <label for="system" class="unseen">Introduction</label>
                <textarea id="system" rows="2" value=${system} placeholder=${INTRODUCTION}
                    onInput=${(e) => chat.set({ system: e.target.value })}></textarea>
                <p class="hint">OPT is no chat model: the conversation is written as a text, with a name in front of each
                    turn, which the model continues.</p>
            </details>
            ${turns.map(
                (turn, i) => html`
                <${Turn} key=${i} turn=${turn} busy=${busy && isLast(i)} idle=${!busy} edit=${() => edit(i)}
                    again=${isLast(i) && again} />
            `,
            )}
            ${turns.some(({ tokens }) => tokens?.length) && html`<${Legend} />`}
            <${Waiting} generation=${generation} />
            <${Notice} />
            <div class="card composer" ref=${end}>
                <label for="draft">Message</label>
                <textarea id="draft" rows="2" value=${draft} placeholder="Say something"
                    onInput=${(e) => chat.set({ draft: e.target.value })}></textarea>
                <div class="bar">
                    ${
                        busy
                            ? html`<${Button} kind="main stop" onClick=${() => generation.stop()}>Stop <kbd>Esc</kbd><//>`
                            : html`<${Button} kind="main" disabled=${!chosen} onClick=${send}>Send <kbd>${CTRL} ↵</kbd><//>`
                    }
                    <${CopyButton} kind="chat" fields=${(fields) => ({ messages: messages(said), ...only(fields) })} />
                    ${
                        turns.length > 0 &&
                        html`<${Button} disabled=${busy} onClick=${() => chat.set({ ...empty(), system })}>New conversation<//>`
                    }
                    <${SideButtons} />
                </div>
            </div>
        </section>
    `;
}

function Turn({ turn, busy, idle, edit, again }) {
    const { role, text, tokens, finish, figures } = turn;
    if (role === "user") {
        return html`
            <article class="card turn person">
                <h2>You</h2>
                <p class="plain">${text}</p>
                <footer><${Button} disabled=${!idle} onClick=${edit}>Edit<//></footer>
            </article>
        `;
    }
    return html`
        <article class="card turn text">
            <h2>Assistant</h2>
            <${Tokens} tokens=${tokens ?? []} text=${text} label="Tokens of the reply" busy=${busy} />
            <footer>
                <span class="ending">${finish ? [ending(finish), figures].filter(Boolean).join(" · ") : ""}</span>
                ${again && html`<${Button} disabled=${!idle} onClick=${again}>Regenerate<//>`}
                <${Button} onClick=${() => copyAloud(text)}>Copy text<//>
            </footer>
        </article>
    `;
}
