// Dialogs: a request as a command, the API key, help.
import { access, setKey } from "./api.js";
import { asCurl, asJson, asPython } from "./commands.js";
import { Button, CTRL, html, useEffect, useRef, useState } from "./dom.js";
import { KeyForm, copyAloud } from "./notices.js";
import { readBody } from "./playground.js";
import { useStore } from "./store.js";

/** A dialog over the page. The browser keeps the focus in it, and gives it back when it is closed. */
function Dialog({ title, close, children }) {
    const box = useRef(null);
    useEffect(() => box.current.showModal(), []);
    // Its own area is that of its content, so what is outside of it is the backdrop.
    const outside = (event) => event.target === box.current && box.current.close();
    return html`
        <dialog ref=${box} aria-labelledby="dialog-title" onClose=${close} onPointerDown=${outside}>
            <div class="sheet">
                <header>
                    <h2 id="dialog-title">${title}</h2>
                    <${Button} kind="icon" aria-label="Close" onClick=${() => box.current.close()}>×<//>
                </header>
                ${children}
            </div>
        </dialog>
    `;
}

const FORMS = { curl: asCurl, Python: asPython, JSON: (_origin, _kind, body) => `${asJson(body)}\n` };

/** Shows the request of a view as something to run elsewhere; `fields` makes its body from the controls' fields. */
export function CopyButton({ kind, fields }) {
    const [body, setBody] = useState(null);
    const [form, setForm] = useState("curl");
    const [copied, setCopied] = useState(false);
    const { key } = useStore(access);
    const text = body && FORMS[form](location.origin, kind, body, key !== "");
    const open = async () => {
        setCopied(false);
        setBody(await readBody(kind, fields));
    };
    const pick = (name) => {
        setForm(name);
        setCopied(false);
    };
    const take = async () => setCopied(await copyAloud(text));
    return html`
        <${Button} onClick=${open}>Code<//>
        ${
            body &&
            html`<${Dialog} title="This request as code" close=${() => setBody(null)}>
            <div class="segments" role="group" aria-label="Form">
                ${Object.keys(FORMS).map((name) => {
                    const pressed = name === form ? "true" : "false";
                    return html`<${Button} kind="" key=${name} aria-pressed=${pressed} onClick=${() => pick(name)}>${name}<//>`;
                })}
            </div>
            <pre class="code" tabindex="0" aria-label=${`The request as ${form}`}>${text}</pre>
            <div class="actions">
                ${
                    key !== "" &&
                    form !== "JSON" &&
                    html`<p class="hint">The API key is read from the variable FERROPT_API_KEY.</p>`
                }
                <${Button} kind="main" onClick=${take}>${copied ? "Copied" : "Copy"}<//>
            </div>
        <//>`
        }
    `;
}

/** The API key, for as long as the tab is open. */
export function KeyDialog({ close }) {
    const { key } = useStore(access);
    return html`
        <${Dialog} title="API key" close=${close}>
            <p>The key goes with every request. It is kept until this tab is closed, and nowhere else.</p>
            <${KeyForm} done=${close}>
                ${key && html`<${Button} onClick=${() => (setKey(""), close())}>Forget the key in use<//>`}
            <//>
        <//>
    `;
}

const SHORTCUTS = [
    [[CTRL, "Enter"], "Generate; in a conversation, send"],
    [[CTRL, "Shift", "Enter"], "Continue the text that is there"],
    [["Esc"], "Stop; close what is open"],
    [["Alt", "1"], "Playground; with 2 chat, with 3 status"],
    [["←", "→", "↑", "↓"], "In a text: from token to token, with the alternatives"],
    [["Enter"], "On a token: into the alternatives; there, go on with one"],
    [["?"], "This help, when nothing is being typed"],
];

export function HelpDialog({ close }) {
    return html`
        <${Dialog} title="Help" close=${close}>
            <h3>Keys</h3>
            <dl class="shortcuts">
                ${SHORTCUTS.map(
                    ([keys, what]) => html`
                    <div key=${what}><dt>${keys.map((key) => html`<kbd key=${key}>${key}</kbd>`)}</dt><dd>${what}</dd></div>
                `,
                )}
            </dl>
            <h3>Reading a text</h3>
            <p>The darker a token's background, the less likely the model thought it, before temperature and penalties.
                Point at a token, tap on it or go to it with the keys to see what else could have stood there. Choosing an
                alternative makes a new version that goes on from it; the old one stays, a step back.</p>
            <p>A text that is read by a screen reader is plain when “Alternatives” under “More” is empty.</p>
            <h3>What is kept</h3>
            <p>History and settings stay in this browser. The API key is forgotten with the tab. The page loads nothing from
                anywhere but this server, whose API is described at <a href="/openapi.json">/openapi.json</a>.</p>
        <//>
    `;
}
