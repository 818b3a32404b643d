// What went wrong, above the texts, and what screen readers are told.
import { Button, copy, html, useEffect, useState } from "./dom.js";
import { setKey } from "./api.js";
import { Store, useStore } from "./store.js";

/** `current` is `{ message, field, actions: [{ label, run }] }` or null; `said` is for screen readers. */
const state = new Store({ current: null, said: "" });

export const notice = (current) => state.set({ current });

/** Lets screen readers say something, when they are done with what they say. */
export const announce = (said) => state.set({ said });

/** Copies a text, and says so; returns whether it could. */
export async function copyAloud(text) {
    const done = await copy(text);
    announce(done ? "Copied." : "The browser does not allow copying.");
    return done;
}

/** The live region. It is in the page from the start, or screen readers would miss what comes first. */
export function Announcer() {
    return html`<p class="unseen" role="status">${useStore(state).said}</p>`;
}

/** The error of a request that no control is to blame for. */
export function Notice() {
    const { current } = useStore(state);
    if (!current) return null;
    const run = (action) => () => {
        notice(null);
        action();
    };
    return html`
        <div class="notice bad">
            <p>${current.field && html`<code>${current.field}</code> `}${current.message}</p>
            <div class="actions">
                ${current.actions?.map(({ label, run: action }) => html`<${Button} onClick=${run(action)}>${label}<//>`)}
                <${Button} onClick=${() => notice(null)}>Dismiss<//>
            </div>
        </div>
    `;
}

/** A server that is busy, and how long until it is asked again. */
export function Waiting({ generation }) {
    const { phase, message, retryAt } = useStore(generation.status);
    const [now, setNow] = useState(Date.now());
    useEffect(() => {
        if (phase !== "waiting") return;
        setNow(Date.now());
        announce(`The server is busy: ${message}. It is asked again in a moment.`);
        const timer = setInterval(() => setNow(Date.now()), 250);
        return () => clearInterval(timer);
    }, [phase, retryAt]);
    if (phase !== "waiting") return null;
    const seconds = Math.max(0, Math.ceil((retryAt - now) / 1000));
    return html`
        <div class="notice wait">
            <p><b>The server is busy.</b> ${message}. Trying again in ${seconds} s.</p>
            <div class="actions">
                <${Button} onClick=${() => generation.tryNow()}>Try now<//>
                <${Button} onClick=${() => generation.stop()}>Cancel<//>
            </div>
        </div>
    `;
}

/** Where a key is typed. */
export function KeyForm({ done, children }) {
    const submit = (event) => {
        event.preventDefault();
        setKey(event.target.elements.key.value.trim());
        notice(null);
        done?.();
    };
    return html`
        <form class="key" onSubmit=${submit}>
            <label>API key <input name="key" type="password" autocomplete="off" spellcheck=${false} required /></label>
            <button type="submit">Use it</button>
            ${children}
        </form>
    `;
}
