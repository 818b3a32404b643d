// The playground's view.
import { Button, CTRL, html, useEffect, useRef } from "./dom.js";
import { CopyButton } from "./dialogs.js";
import { models } from "./models.js";
import { Notice, Waiting, copyAloud } from "./notices.js";
import {
    adopt,
    branch,
    generate,
    generation,
    playground,
    proceed,
    regenerate,
    setPrompt,
    show,
    shownRun,
    textOf,
    tokensOf,
} from "./playground.js";
import { SideButtons } from "./side.js";
import { useStore } from "./store.js";
import { ending } from "./texts.js";
import { Legend, Tokens } from "./tokens.js";

/** Keys of this view. */
export function keys(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        if (event.shiftKey) shownRun() && proceed(0);
        else generate();
        return true;
    }
    if (event.key === "Escape" && generation.busy) {
        generation.stop();
        return true;
    }
    return false;
}

export function Complete() {
    const { prompt, runs, shown, wrong } = useStore(playground);
    const { phase } = useStore(generation.status);
    const { chosen } = useStore(models);
    const busy = phase !== "idle";
    const run = runs[shown];
    const last = shown === runs.length - 1;
    return html`
        <section class="work" aria-label="Playground">
            <div class=${`card composer${wrong ? " is-wrong" : ""}`}>
                <label for="prompt">Prompt</label>
                <${Growing} id="prompt" value=${prompt} onInput=${setPrompt} wrong=${wrong}
                    placeholder="Write something for the model to continue" />
                ${wrong && html`<p class="wrong" id="prompt-wrong">${wrong}</p>`}
                <div class="bar">
                    ${
                        busy
                            ? html`<${Button} kind="main stop" onClick=${() => generation.stop()}>Stop <kbd>Esc</kbd><//>`
                            : html`<${Button} kind="main" disabled=${!chosen} onClick=${() => generate()}>
                                  Generate <kbd>${CTRL} ↵</kbd>
                              <//>`
                    }
                    <${CopyButton} kind="completion" fields=${(fields) => ({ prompt, ...fields })} />
                    <${SideButtons} />
                </div>
            </div>
            <${Waiting} generation=${generation} />
            <${Notice} />
            ${!run && html`<${Empty} />`}
            ${run && html`<${Output} key=${run.id} run=${run} count=${runs.length} shown=${shown} busy=${busy && last} />`}
        </section>
    `;
}

/** A field that is as high as what is written in it, up to a part of the screen. */
function Growing({ id, value, onInput, placeholder, wrong }) {
    const area = useRef(null);
    useEffect(() => {
        area.current.style.height = "auto";
        area.current.style.height = `${area.current.scrollHeight + 2}px`;
    }, [value]);
    return html`<textarea ref=${area} id=${id} rows="3" value=${value} placeholder=${placeholder}
        aria-invalid=${wrong ? "true" : undefined}
        aria-describedby=${wrong ? `${id}-wrong` : undefined} onInput=${(e) => onInput(e.target.value)}></textarea>`;
}

function Empty() {
    const take = (text) => {
        setPrompt(text);
        document.getElementById("prompt").focus();
    };
    const examples = [
        "The first time I saw the sea,",
        "Question: Why is the sky blue?\nAnswer:",
        "def fibonacci(n):\n",
    ];
    return html`
        <div class="empty">
            <p>The model continues whatever stands in the prompt. Each token of its text shows how likely it was; choose
                one to see the alternatives and to go on from there with another.</p>
            <ul>
                ${examples.map((text) => html`<li key=${text}><${Button} onClick=${() => take(text)}>${text.trim()}<//></li>`)}
            </ul>
        </div>
    `;
}

function Output({ run, count, shown, busy }) {
    return html`
        <section class="output" aria-label="Texts">
            <header>
                <h2>${run.texts.length > 1 ? `${run.texts.length} texts` : "Text"}</h2>
                ${
                    count > 1 &&
                    html`<span class="pager">
                    <${Button} kind="icon" aria-label="Previous version" disabled=${shown === 0 || busy}
                        onClick=${() => show(shown - 1)}>‹<//>
                    <span>Version ${shown + 1} of ${count}</span>
                    <${Button} kind="icon" aria-label="Next version" disabled=${shown === count - 1 || busy}
                        onClick=${() => show(shown + 1)}>›<//>
                </span>`
                }
                <span class="figures">${busy ? "generating…" : run.figures}</span>
            </header>
            ${run.texts.map((_, choice) => html`<${Text} key=${choice} run=${run} choice=${choice} busy=${busy} />`)}
            ${tokensOf(run, 0).length > 0 && html`<${Legend} />`}
        </section>
    `;
}

function Text({ run, choice, busy }) {
    const { finish } = run.texts[choice];
    const text = textOf(run, choice);
    const several = run.texts.length > 1;
    const label = several ? `Tokens of text ${choice + 1}` : "Tokens of the text";
    return html`
        <article class="card text">
            ${several && html`<h3>Text ${choice + 1}</h3>`}
            <${Tokens} tokens=${tokensOf(run, choice)} text=${text} label=${label} busy=${busy && finish === null}
                branch=${(place, name) => branch(run, choice, place, name)}
                regenerate=${(place) => regenerate(run, choice, place)} goOn=${(place) => proceed(choice, place, run)} />
            <footer>
                <span class="ending">${finish && text === "" ? "empty: " : ""}${finish && ending(finish)}</span>
                <${Button} disabled=${busy} onClick=${() => generate(run.kept, run.prompt)}>Regenerate<//>
                <${Button} disabled=${busy || text === ""} onClick=${() => proceed(choice, undefined, run)}>Continue<//>
                <${Button} disabled=${busy || text === ""} onClick=${() => adopt(choice, run)}>Use as prompt<//>
                <${Button} disabled=${text === ""} onClick=${() => copyAloud(text)}>Copy text<//>
            </footer>
        </article>
    `;
}
