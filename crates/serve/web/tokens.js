// A text whose tokens can be looked at: coloured by probability, with the alternatives at each place.
import { Button, Component, html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./dom.js";
import { SHADES, hasNoWidth, isPart, isSpecial, percent, shade, shown } from "./texts.js";

/** Tokens that are drawn, or left alone, together. */
const BLOCK = 64;
/** Milliseconds: a pointer that rests on a token so long means it, and one that left for longer does not come back. */
const REST = 90;
const LEAVE = 220;

/**
 * `tokens` as in texts.js; `label` names the text for screen readers. `branch(place, name)` goes on from there with another
 * token, `regenerate(place)` without it, `goOn(place)` behind it; without these, alternatives are only shown.
 */
export function Tokens({ tokens, text, label, busy, branch, regenerate, goOn }) {
    const list = useRef(null);
    const timer = useRef(null);
    // The token that the keyboard is at, and the one whose alternatives are shown, for good or while it is pointed at.
    const [active, setActive] = useState(0);
    const [open, setOpen] = useState(null);
    const id = useMemo(() => `text-${Math.random().toString(36).slice(2, 8)}`, []);
    const show = (place, pinned) => {
        clearTimeout(timer.current);
        setActive(place);
        setOpen({ place, pinned });
    };
    const close = () => {
        clearTimeout(timer.current);
        setOpen(null);
    };
    useEffect(() => () => clearTimeout(timer.current), []);
    useEffect(() => {
        if (!open?.pinned) return;
        const outside = (event) => list.current?.parentElement.contains(event.target) || close();
        document.addEventListener("pointerdown", outside);
        return () => document.removeEventListener("pointerdown", outside);
    }, [open?.pinned]);

    if (!tokens.length) return html`<p class=${`plain${busy ? " writing" : ""}`}>${text}</p>`;
    const at = Math.min(active, tokens.length - 1);
    const spanOf = (place) => list.current.querySelector(`[data-place="${place}"]`);
    const placeOf = (event) => event.target.closest?.("[data-place]")?.dataset.place;
    const key = (event) => {
        const moves = {
            ArrowRight: at + 1,
            ArrowLeft: at - 1,
            ArrowDown: below(list.current, at, 1),
            ArrowUp: below(list.current, at, -1),
            Home: 0,
            End: tokens.length - 1,
        };
        if (event.key in moves && !event.altKey && !event.ctrlKey && !event.metaKey) {
            event.preventDefault();
            const next = Math.max(0, Math.min(tokens.length - 1, moves[event.key]));
            spanOf(next).scrollIntoView({ block: "nearest" });
            show(next, false);
        } else if ((event.key === "Enter" || event.key === " ") && !event.ctrlKey && !event.metaKey) {
            event.preventDefault();
            show(at, true);
        } else if (event.key === "Escape" && open) {
            event.stopPropagation();
            close();
        }
    };
    const over = (event) => {
        const place = placeOf(event);
        clearTimeout(timer.current);
        if (event.pointerType !== "mouse" || open?.pinned || place === undefined) return;
        timer.current = setTimeout(() => show(Number(place), false), REST);
    };
    const leave = (event) => {
        clearTimeout(timer.current);
        if (event.pointerType === "mouse" && open && !open.pinned) timer.current = setTimeout(close, LEAVE);
    };
    const stay = () => clearTimeout(timer.current);
    const click = (event) => {
        // Whoever marks text to copy it wants nothing else.
        if (placeOf(event) !== undefined && window.getSelection().isCollapsed)
            show(Number(placeOf(event)), true);
    };
    const focus = (event) => event.target.matches(":focus-visible") && !open && show(at, false);
    // Whoever goes into the alternatives does not leave. A list that is taken away has lost its place already.
    const blur = (event) =>
        open && !open.pinned && !event.currentTarget.parentElement?.contains(event.relatedTarget) && close();
    const back = () => {
        close();
        list.current.focus();
    };
    const blocks = [];
    for (let first = 0; first < tokens.length; first += BLOCK) {
        blocks.push(
            html`<${Block} key=${first} id=${id} first=${first} tokens=${tokens.slice(first, first + BLOCK)}
                active=${at >= first && at < first + BLOCK ? at : -1} />`,
        );
    }
    return html`
        <div class="tokens">
            <div ref=${list} class=${`list${busy ? " writing" : ""}`} role="listbox" tabindex="0"
                aria-label=${label} aria-activedescendant=${`${id}-${at}`} onKeyDown=${key} onPointerOver=${over}
                onPointerLeave=${leave} onClick=${click} onFocus=${focus} onBlur=${blur}>
                ${blocks}
            </div>
            ${
                open &&
                open.place < tokens.length &&
                html`<${Alternatives} key=${open.place} token=${tokens[open.place]} place=${open.place} pinned=${open.pinned}
                    anchor=${() => spanOf(open.place)} busy=${busy} branch=${branch} regenerate=${regenerate} goOn=${goOn}
                    back=${back} onEnter=${stay} onLeave=${leave} />`
            }
        </div>
    `;
}

/** The token a line further, nearest to where this one is. */
function below(list, at, lines) {
    const spans = list?.querySelectorAll("[data-place]") ?? [];
    const box = spans[at]?.getBoundingClientRect();
    if (!box) return at;
    let [best, near] = [at, Infinity];
    for (let i = at + lines; i >= 0 && i < spans.length; i += lines) {
        const other = spans[i].getBoundingClientRect();
        const rows = Math.round(
            ((other.top - box.top) * lines) / Math.max(1, parseFloat(getComputedStyle(list).lineHeight)),
        );
        if (rows > 1) break;
        const away = Math.abs(other.left - box.left);
        if (rows === 1 && away < near) [best, near] = [i, away];
    }
    return best;
}

/** Some tokens; they are drawn again only when they changed. */
class Block extends Component {
    shouldComponentUpdate({ tokens, active }) {
        const old = this.props.tokens;
        return (
            active !== this.props.active ||
            tokens.length !== old.length ||
            tokens.some((token, i) => token !== old[i])
        );
    }

    render({ id, first, tokens, active }) {
        return html`<span role="presentation">${tokens.map((token, i) => {
            const [place, tint] = [first + i, shade(token.logprob)];
            const classes = [
                "token",
                tint === null ? "" : `shade-${tint}`,
                place === active ? "active" : "",
                token.kept ? "kept" : "",
            ];
            if (token.text.includes("\n")) classes.push("line-end");
            if (token.text === "") classes.push("part");
            if (hasNoWidth(token.text)) classes.push("mark");
            return html`<span key=${place} id=${`${id}-${place}`} data-place=${place} class=${classes.join(" ").trim()}
                role="option" aria-selected=${place === active ? "true" : "false"}
                aria-label=${`${token.text.trim() || spoken(token.name)}, ${percent(token.logprob)}`}>${token.text}</span>`;
        })}</span>`;
    }
}

/** A token's name for screen readers. */
function spoken(name) {
    if (isPart(name)) return `part of a character, ${shown(name)}`;
    if (name.trim() === "") return name.includes("\n") ? "new line" : "space";
    return name;
}

function Alternatives({
    token,
    place,
    pinned,
    anchor,
    busy,
    branch,
    regenerate,
    goOn,
    back,
    onEnter,
    onLeave,
}) {
    const box = useRef(null);
    const [spot, setSpot] = useState(null);
    useLayoutEffect(() => {
        const word = anchor()?.getClientRects()[0];
        const around = box.current.offsetParent.getBoundingClientRect();
        if (!word) return;
        const width = box.current.offsetWidth;
        // Within the text's width, and on a narrow screen within the screen.
        const most = Math.min(around.width, document.documentElement.clientWidth - around.left - 8) - width;
        setSpot({
            left: `${Math.max(0, Math.min(word.left - around.left - 8, most))}px`,
            top: `${word.bottom - around.top + 2}px`,
        });
    }, [token]);
    useEffect(() => {
        if (!pinned) return;
        const first = box.current.querySelector("button:not(:disabled)") ?? box.current;
        first.focus({ preventScroll: true });
        box.current.scrollIntoView({ block: "nearest" });
    }, [pinned]);
    const key = (event) => {
        const buttons = [...box.current.querySelectorAll("button:not(:disabled)")];
        const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") {
            event.stopPropagation();
            back();
        } else if (step && buttons.length) {
            event.preventDefault();
            buttons[
                (buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length
            ].focus();
        }
    };
    const rank = token.top.findIndex(({ name }) => name === token.name);
    const facts = [`log-probability ${token.logprob?.toFixed(2) ?? "unknown"}`];
    // The last one may be there only because it was chosen.
    if (rank === 0 || (rank > 0 && rank < token.top.length - 1)) facts.push(`rank ${rank + 1}`);
    const act = (action) => () => {
        back();
        action();
    };
    return html`
        <div ref=${box} class="alternatives" role="dialog" aria-label=${`Alternatives to ${spoken(token.name)}`}
            tabindex="-1" style=${spot ?? { visibility: "hidden" }}
            onKeyDown=${key} onPointerEnter=${onEnter} onPointerLeave=${onLeave}>
            <p class="chosen"><b>${shown(token.name)}</b> <span>${percent(token.logprob)}</span></p>
            <p class="facts">${facts.join(" · ")}</p>
            <ol>
                ${token.top.map(({ name, logprob }) => {
                    const chosen = name === token.name;
                    const bar = html`<span class="bar" style=${{ width: `${Math.max(1, 100 * Math.exp(logprob))}%` }}></span>`;
                    const share = html`<span class="share">${percent(logprob)}</span>`;
                    const inside = html`${bar}<span class="name">${shown(name)}</span>${share}`;
                    const usable = branch && !busy && !chosen && !isPart(name) && !isSpecial(name);
                    return html`<li key=${name} class=${chosen ? "is-chosen" : ""}>${
                        usable
                            ? html`<${Button} kind="" title="Go on from here with this token"
                                  onClick=${act(() => branch(place, name))}>${inside}<//>`
                            : html`<div>${inside}</div>`
                    }</li>`;
                })}
            </ol>
            ${
                branch &&
                html`<div class="actions">
                <${Button} disabled=${busy} onClick=${act(() => regenerate(place))}>Again from here<//>
                <${Button} disabled=${busy} onClick=${act(() => goOn(place))}>Go on behind it<//>
            </div>`
            }
        </div>
    `;
}

/** What the shades mean. */
export function Legend() {
    const one = ({ label }, i) => html`<span key=${i} class=${`token shade-${i}`}>${label}</span>`;
    return html`<p class="legend"><span>Probability</span>${SHADES.map(one)}</p>`;
}
