// The page: its header, its three views, and the keys that work everywhere.
import { access } from "./api.js";
import * as chat from "./chat.js";
import * as complete from "./complete.js";
import { HelpDialog, KeyDialog } from "./dialogs.js";
import { Button, html, render, useEffect, useState } from "./dom.js";
import { choose, findModels, models } from "./models.js";
import { Announcer, KeyForm, notice } from "./notices.js";
import * as playground from "./playground.js";
import { Side } from "./side.js";
import { Status } from "./status.js";
import { keep, recall, useStore } from "./store.js";

const VIEWS = {
    complete: { title: "Playground", view: complete.Complete, keys: complete.keys },
    chat: { title: "Chat", view: chat.Chat, keys: chat.keys },
    status: { title: "Status", view: Status, keys: () => false },
};

const wanted = () => (location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "complete");

function App() {
    const [name, setName] = useState(wanted());
    const [dialog, setDialog] = useState(null);
    const { title, view: View, keys } = VIEWS[name];
    useEffect(() => {
        const moved = () => {
            notice(null);
            setName(wanted());
        };
        window.addEventListener("hashchange", moved);
        return () => window.removeEventListener("hashchange", moved);
    }, []);
    useEffect(() => {
        document.title = `${title} · Ferropt`;
        const pressed = (event) => {
            if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
            const typing = event.target.matches?.("input, textarea, select");
            const view =
                event.altKey &&
                !event.ctrlKey &&
                !event.metaKey &&
                Object.keys(VIEWS)[Number(event.code.replace("Digit", "")) - 1];
            if (keys(event)) event.preventDefault();
            else if (view) {
                event.preventDefault();
                location.hash = view;
            } else if (event.key === "?" && !typing) setDialog("help");
        };
        document.addEventListener("keydown", pressed);
        return () => document.removeEventListener("keydown", pressed);
    }, [name]);
    const skip = (event) => {
        event.preventDefault();
        document.getElementById("main").focus();
    };
    const open = (entry) => {
        const isChat = entry.kind === "chat";
        (isChat ? chat : playground).open(entry);
        location.hash = isChat ? "chat" : "complete";
    };
    return html`
        <a class="skip" href="#main" onClick=${skip}>To the content</a>
        <${Header} name=${name} setDialog=${setDialog} />
        <${Reach} />
        <main id="main" tabindex="-1" class=${name}>
            <h1 class="unseen">${title}</h1>
            <${View} />
            ${name !== "status" && html`<${Side} chat=${name === "chat"} open=${open} />`}
        </main>
        <${Announcer} />
        ${dialog === "help" && html`<${HelpDialog} close=${() => setDialog(null)} />`}
        ${dialog === "key" && html`<${KeyDialog} close=${() => setDialog(null)} />`}
    `;
}

function Header({ name, setDialog }) {
    const { list, chosen } = useStore(models);
    const { key } = useStore(access);
    const label = ({ id, status }) => (status === "ready" || status === undefined ? id : `${id} (${status})`);
    return html`
        <header class="top">
            <a class="brand" href="#complete"><img src="/page/icon.svg" alt="" width="20" height="20" /> Ferropt</a>
            <nav aria-label="Views">
                ${Object.entries(VIEWS).map(([id, { title }]) => {
                    const current = id === name ? "page" : undefined;
                    return html`<a key=${id} href=${`#${id}`} aria-current=${current}>${title}</a>`;
                })}
            </nav>
            <div class="tools">
                <label class="unseen" for="model">Model</label>
                <select id="model" value=${chosen} disabled=${!list.length} onChange=${(e) => choose(e.target.value)}>
                    ${!list.length && html`<option value="">no model</option>`}
                    ${list.map((model) => html`<option key=${model.id} value=${model.id}>${label(model)}</option>`)}
                </select>
                <${Button} onClick=${() => setDialog("key")}>${key ? "Key set" : "Key"}<//>
                <${Theme} />
                <${Button} kind="icon" aria-label="Help" title="Help" onClick=${() => setDialog("help")}>?<//>
            </div>
        </header>
    `;
}

/** What the system says, or always light or dark; early.js sets it before anything is drawn. */
function Theme() {
    const [theme, setTheme] = useState(recall("localStorage", "theme", null));
    const next = { light: "dark", dark: null }[theme] ?? (theme === null ? "light" : null);
    const turn = () => {
        keep("localStorage", "theme", next);
        if (next) document.documentElement.dataset.theme = next;
        else delete document.documentElement.dataset.theme;
        setTheme(next);
    };
    const [sign, label] = { light: ["☀", "Light"], dark: ["☾", "Dark"] }[theme] ?? ["◐", "As the system"];
    const name = `Colours: ${label}`;
    return html`<${Button} kind="icon" aria-label=${name} title=${name} onClick=${turn}>${sign}<//>`;
}

/** Whether the server can be reached at all. */
function Reach() {
    const { state, list, chosen, error } = useStore(models);
    if (state === "lost")
        return html`
            <div class="notice bad wide" role="alert">
                <p><b>The server does not answer</b> (${error.message}). It is asked again every two seconds.</p>
            </div>
        `;
    if (state === "refused") {
        return html`
            <div class="notice wait wide">
                <p><b>The server wants an API key.</b> ${error.message}.</p>
                <${KeyForm} />
            </div>
        `;
    }
    const status = list.find(({ id }) => id === chosen)?.status;
    if (status === "failed")
        return html`
            <div class="notice bad wide">
                <p>The model <code>${chosen}</code> could not be loaded; the server's log says why.</p>
            </div>
        `;
    if (status === "loading")
        return html`<div class="notice wait wide"><p>The model <code>${chosen}</code> is being loaded.</p></div>`;
    return null;
}

findModels();
render(html`<${App} />`, document.getElementById("app"));
