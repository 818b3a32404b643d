// What every component is written with. Text is only ever a text node: nothing here takes markup from a string at run time.
import { h } from "./vendor/preact.js";
import htm from "./vendor/htm.js";

export { useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/preact-hooks.js";
export { Component, render } from "./vendor/preact.js";

/** Elements from a template: html`<p class=${name}>${text}</p>`. */
export const html = htm.bind(h);

/** A button, which sends no form; `kind` is its class in the style. */
export const Button = ({ kind = "quiet", children, ...rest }) =>
    html`<button type="button" class=${kind} ...${rest}>${children}</button>`;

/** What is called Ctrl on most keyboards. */
export const CTRL = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";

/** Copies a text; returns whether that was possible. */
export async function copy(text) {
    try {
        await navigator.clipboard.writeText(text);
        return true;
    } catch {
        // Browsers have a clipboard only on https and on the machine itself; elsewhere there is the old way.
        const area = document.createElement("textarea");
        area.value = text;
        // Outside of an open dialog nothing can be selected.
        (document.querySelector("dialog[open]") ?? document.body).append(area);
        area.select();
        const copied = document.execCommand("copy");
        area.remove();
        return copied;
    }
}

/** Lets the browser save a text as a file. */
export function save(name, text, type) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
