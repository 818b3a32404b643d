// What was generated, kept in this browser alone: newest first.
import { Store, keep, recall } from "./store.js";

/** Most entries. */
const MOST = 100;

const NAME = "history";

/** What all tabs have kept by now. */
function stored() {
    const entries = recall("localStorage", NAME, []);
    return Array.isArray(entries) ? entries : [];
}

/** Entries that the browser has no room for: they last as long as the page. */
let unsaved = [];

/** All of them. Those that there is no room for are the oldest. */
function all() {
    const kept = stored().filter(({ id }) => !unsaved.some((entry) => entry.id === id));
    return [...kept, ...unsaved];
}

export const history = new Store({ entries: all() });

/** Adds an entry, or takes the place of the one with its `id`. */
export function remember(entry) {
    set([entry, ...all().filter(({ id }) => id !== entry.id)].slice(0, MOST));
}

export function forget(id) {
    set(all().filter((entry) => entry.id !== id));
}

export function clear() {
    set([]);
}

function set(entries) {
    // A browser gives a page a few megabytes, or none. The oldest make room.
    let count = entries.length;
    while (!keep("localStorage", NAME, entries.slice(0, count)) && count) count = Math.floor(count * 0.8);
    unsaved = entries.slice(count);
    history.set({ entries });
}

// Other tabs change it too; `key` is null when all was cleared.
window.addEventListener("storage", ({ key }) => {
    if (key === null || key === `ferropt.${NAME}`) history.set({ entries: all() });
});

/** A name for an entry that is not used twice. */
export const newId = () => `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;
