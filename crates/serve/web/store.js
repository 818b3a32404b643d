// State that several parts of the page look at, and what of it outlives the page.
import { useEffect, useState } from "./vendor/preact-hooks.js";

/** A value with listeners. */
export class Store {
    #listeners = new Set();

    constructor(value) {
        this.value = value;
    }

    /** Changes some fields. */
    set(changes) {
        this.value = { ...this.value, ...changes };
        for (const listener of this.#listeners) listener(this.value);
    }

    /** Calls `listener` after each change; returns what ends that. */
    listen(listener) {
        this.#listeners.add(listener);
        return () => this.#listeners.delete(listener);
    }
}

/** The value of a store, for a component, which is drawn again when it changes. */
export function useStore(store) {
    const [value, setValue] = useState(store.value);
    useEffect(() => {
        // It may have changed between drawing and this.
        setValue(store.value);
        return store.listen(setValue);
    }, [store]);
    return value;
}

/** Reads what an earlier visit kept. A browser may refuse storage, and what is there may be damaged. */
export function recall(storage, name, otherwise) {
    try {
        const text = window[storage].getItem(`ferropt.${name}`);
        return text === null ? otherwise : JSON.parse(text);
    } catch {
        return otherwise;
    }
}

/** Keeps something for later visits; returns whether there was room. */
export function keep(storage, name, value) {
    try {
        if (value === null) window[storage].removeItem(`ferropt.${name}`);
        else window[storage].setItem(`ferropt.${name}`, JSON.stringify(value));
        return true;
    } catch {
        return false;
    }
}
