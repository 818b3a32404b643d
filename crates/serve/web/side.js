// Beside the work: the controls and the history. On a narrow screen they come over the page when they are asked for.
import { Button, html, save, useEffect, useRef, useState } from "./dom.js";
import { clear, forget, history } from "./history.js";
import { announce } from "./notices.js";
import { Settings, settings } from "./settings.js";
import { Store, useStore } from "./store.js";

/** Which of the two is shown, and whether it is over the page. */
const side = new Store({ tab: "settings", over: false });

/** For narrow screens, where the side is not seen. */
export function SideButtons() {
    const open = (tab) => () => side.set({ tab, over: true });
    return html`
        <span class="side-buttons">
            <${Button} onClick=${open("settings")}>Settings<//>
            <${Button} onClick=${open("history")}>History<//>
        </span>
    `;
}

export function Side({ chat, open }) {
    const { tab, over } = useStore(side);
    const { wrong } = useStore(settings);
    const box = useRef(null);
    const before = useRef(null);
    useEffect(() => {
        // A control with an error has to be seen.
        if (wrong) side.set({ tab: "settings", over: window.matchMedia("(max-width: 59.99rem)").matches });
    }, [wrong]);
    useEffect(() => {
        if (!over) return;
        before.current = document.activeElement;
        if (!wrong) box.current.querySelector("button").focus();
        return () => before.current?.focus?.();
    }, [over]);
    const close = () => side.set({ over: false });
    const key = (event) => {
        if (event.key !== "Escape" || !over) return;
        event.stopPropagation();
        close();
    };
    const taken = (entry) => {
        open(entry);
        close();
    };
    const names = { settings: "Settings", history: "History" };
    return html`
        ${over && html`<div class="shade" onClick=${close}></div>`}
        <aside ref=${box} class=${over ? "side over" : "side"} aria-label="Settings and history" onKeyDown=${key}>
            <div class="segments" role="group" aria-label="Shown beside the text">
                ${Object.entries(names).map(([name, label]) => {
                    const [pressed, pick] = [name === tab ? "true" : "false", () => side.set({ tab: name })];
                    return html`<${Button} kind="" key=${name} aria-pressed=${pressed} onClick=${pick}>${label}<//>`;
                })}
                <${Button} kind="icon close" aria-label="Close" onClick=${close}>×<//>
            </div>
            ${tab === "settings" ? html`<${Settings} chat=${chat} />` : html`<${History} open=${taken} />`}
        </aside>
    `;
}

function History({ open }) {
    const { entries } = useStore(history);
    const [sure, setSure] = useState(false);
    const download = () =>
        save(
            `ferropt-history-${new Date().toISOString().slice(0, 10)}.json`,
            `${JSON.stringify(entries, null, 1)}\n`,
            "application/json",
        );
    const empty = () => {
        if (sure) {
            clear();
            announce("The history is empty.");
        }
        setSure(!sure);
    };
    const kinds = { completion: "playground", chat: "chat" };
    if (!entries.length)
        return html`<p class="hint history-empty">What is generated is kept here, in this browser alone.</p>`;
    return html`
        <div class="history">
            <ol>
                ${entries.map(
                    (entry) => html`
                    <li key=${entry.id}>
                        <button type="button" class="entry" onClick=${() => open(entry)}>
                            <span class="when">${[when(entry.at), kinds[entry.kind], entry.model].join(" · ")}</span>
                            <span class="begin">${title(entry)}</span>
                        </button>
                        <${Button} kind="icon" aria-label=${`Remove: ${title(entry)}`} onClick=${() => forget(entry.id)}>×<//>
                    </li>
                `,
                )}
            </ol>
            <div class="actions">
                <${Button} onClick=${download}>Export<//>
                <${Button} onClick=${empty} onBlur=${() => setSure(false)}>
                    ${sure ? "Really clear all" : "Clear"}
                <//>
            </div>
            <p class="hint">Kept in this browser alone.</p>
        </div>
    `;
}

/** How an entry begins. */
function title(entry) {
    const text =
        entry.kind === "chat"
            ? entry.turns.map(({ text }) => text).join(" ")
            : entry.prompt + entry.kept.text + (entry.texts[0]?.text ?? "");
    const line = text.replace(/\s+/g, " ").trim();
    return line.length > 120 ? `${line.slice(0, 119)}…` : line;
}

/** A time as short as it can be. */
function when(at) {
    const date = new Date(at);
    const today = date.toDateString() === new Date().toDateString();
    return date.toLocaleString(
        undefined,
        today
            ? { hour: "2-digit", minute: "2-digit" }
            : { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" },
    );
}
