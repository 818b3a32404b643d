// What was generated, kept in this browser alone: newest first.
import { Store, keep, recall } from "./store.js";

/** Most entries. */
const MOST = 100;

const entries = recall("localStorage", "history", []);
export const history = new Store({ entries: Array.isArray(entries) ? entries : [] });

/** Adds an entry, or takes the place of the one with its `id`. */
export function remember(entry) {
    const others = history.value.entries.filter(({ id }) => id !== entry.id);
    set([entry, ...others].slice(0, MOST));
}

export function forget(id) {
    set(history.value.entries.filter((entry) => entry.id !== id));
}

export function clear() {
    set([]);
}

function set(entries) {
    // A browser gives a page a few megabytes. The oldest make room.
    while (!keep("localStorage", "history", entries) && entries.length) {
        entries = entries.slice(0, Math.floor(entries.length * 0.8));
    }
    history.set({ entries });
}

/** A name for an entry that is not used twice. */
export const newId = () => `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;
