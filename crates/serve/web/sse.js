// Server-sent events, read as the HTML standard says (9.2.6), from text in whatever pieces it comes.

export class EventParser {
    #rest = "";
    #data = [];
    #begun = false;

    /** Takes a piece of text; returns the data of the events that it completes. */
    push(text) {
        const complete = [];
        this.#rest += text;
        if (!this.#begun && this.#rest) {
            this.#begun = true;
            if (this.#rest.startsWith("\uFEFF")) this.#rest = this.#rest.slice(1);
        }
        // A carriage return at the very end may be half of a line's end.
        const lines = this.#rest.split(/\r\n|\n|\r(?!$)/);
        this.#rest = lines.pop();
        for (const line of lines) this.#line(line, complete);
        return complete;
    }

    #line(line, complete) {
        if (line === "") {
            if (this.#data.length) complete.push(this.#data.join("\n"));
            this.#data = [];
            return;
        }
        const colon = line.indexOf(":");
        const field = colon < 0 ? line : line.slice(0, colon);
        // Comments, names, ids and times to wait have no meaning here.
        if (field !== "data") return;
        const value = colon < 0 ? "" : line.slice(colon + 1);
        this.#data.push(value.startsWith(" ") ? value.slice(1) : value);
    }
}

/** The data of each event of a stream of bytes. */
export async function* events(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    const parser = new EventParser();
    try {
        for (;;) {
            const { done, value } = await reader.read();
            if (done) return;
            yield* parser.push(value);
        }
    } finally {
        // Whoever stops listening wants no more of it.
        reader.cancel().catch(() => {});
    }
}
