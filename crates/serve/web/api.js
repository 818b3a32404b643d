// The server's API: requests, streams, and what can go wrong.
import { events } from "./sse.js";
import { Store, keep, recall } from "./store.js";

/** The API key, which lives as long as the tab. */
export const access = new Store({ key: recall("sessionStorage", "key", "") });

export function setKey(key) {
    keep("sessionStorage", "key", key || null);
    access.set({ key });
}

/** The server refused. */
export class Refused extends Error {
    constructor(status, error, retryAfter) {
        super(error.message || `the server answered with status ${status}`);
        this.status = status;
        /** The field that is wrong. */
        this.param = error.param ?? null;
        this.code = error.code ?? null;
        /** Seconds after which it is worth trying again; null if it is not. */
        this.retryAfter = retryAfter;
    }
}

/** The server could not be reached, or the connection was lost. */
export class Lost extends Error {}

async function call(path, { body, signal } = {}) {
    const headers = {};
    if (access.value.key) headers.Authorization = `Bearer ${access.value.key}`;
    if (body) headers["Content-Type"] = "application/json";
    let response;
    try {
        const method = body ? "POST" : "GET";
        response = await fetch(path, {
            method,
            headers,
            body: body && JSON.stringify(body),
            signal,
            cache: "no-store",
        });
    } catch (error) {
        throw lost(error);
    }
    if (response.ok) return response;
    const answer = await response.json().catch(() => ({}));
    const seconds = Number(response.headers.get("Retry-After"));
    throw new Refused(response.status, answer.error ?? {}, seconds > 0 ? seconds : null);
}

/** `fetch` says TypeError for everything that happens to a connection. */
function lost(error) {
    return error instanceof TypeError
        ? new Lost("the connection to the server was lost", { cause: error })
        : error;
}

export async function getJson(path, options) {
    return (await call(path, options)).json();
}

export async function getText(path, options) {
    return (await call(path, options)).text();
}

/** The events of a streamed answer, parsed. It is `Lost` when it ends without saying so. */
export async function* stream(path, body, signal) {
    const response = await call(path, {
        body: { ...body, stream: true, stream_options: { include_usage: true } },
        signal,
    });
    try {
        for await (const data of events(response.body)) {
            if (data === "[DONE]") return;
            const event = JSON.parse(data);
            if (event.error) throw new Refused(response.status, event.error, null);
            yield event;
        }
    } catch (error) {
        throw lost(error);
    }
    throw new Lost("the connection to the server was lost before the text was complete");
}
