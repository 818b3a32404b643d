// The server's models, and the one that is asked.
import { Lost, Refused, access, getJson } from "./api.js";
import { Store, keep, recall } from "./store.js";

/** `state` is asking, known, lost (the server does not answer) or refused (it wants a key); `error` says more. */
export const models = new Store({
    state: "asking",
    list: [],
    chosen: recall("localStorage", "model", ""),
    error: null,
});

export function choose(id) {
    keep("localStorage", "model", id);
    models.set({ chosen: id });
}

/** How often a server that does not answer is asked again, in milliseconds. */
const AGAIN = 2000;
let timer = null;

/** Asks for the models, again and again until all are open. */
export async function findModels() {
    clearTimeout(timer);
    try {
        const { data } = await getJson("/v1/models");
        const known = data.some(({ id }) => id === models.value.chosen);
        models.set({
            state: "known",
            list: data,
            chosen: known ? models.value.chosen : (data[0]?.id ?? ""),
            error: null,
        });
        if (data.some(({ status }) => status === "loading")) timer = setTimeout(findModels, AGAIN);
    } catch (error) {
        const wantsKey = error instanceof Refused && error.status === 401;
        models.set({ state: wantsKey ? "refused" : "lost", error });
        if (error instanceof Lost || (error instanceof Refused && !wantsKey))
            timer = setTimeout(findModels, AGAIN);
    }
}

let key = access.value.key;
access.listen((value) => {
    if (value.key !== key) findModels();
    key = value.key;
});
