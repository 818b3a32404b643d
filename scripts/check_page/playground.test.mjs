// The playground, in a browser in front of a real server.
import assert from "node:assert/strict";
import { execFileSync, execSync } from "node:child_process";
import { readFileSync } from "node:fs";
import test, { after, before } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { FIELDS } from "../../crates/serve/web/fields.js";
import { finish, generate, launch, leave, scratch, serve, set, textOf, until, visit } from "./lab.mjs";

let browser, server;
before(async () => {
    [browser, server] = [await launch(), await serve()];
});
after(async () => {
    await browser?.close();
    await server?.stop();
});

/** The bodies of requests that the page sends to a path. */
function sent(page, path = "/v1/completions") {
    const bodies = [];
    page.on("request", (request) => request.url().endsWith(path) && bodies.push(request.postDataJSON()));
    return bodies;
}

const ask = async (body) =>
    (
        await fetch(`${server.url}/v1/completions`, {
            method: "POST",
            headers: { "Content-Type": "application/json" },
            body: JSON.stringify(body),
        })
    ).json();
const token = (page, place) => page.locator(`.list [data-place="${place}"]`);
const box = (page) => page.getByRole("dialog", { name: /Alternatives/ });

test("a browser keeps the files while they stay the same, and may load nothing else", async () => {
    const names = [
        ...readFileSync(new URL("../../crates/serve/src/page.rs", import.meta.url), "utf8").matchAll(
            /"([\w/-]+\.(?:html|js|css|svg))"/g,
        ),
    ];
    assert.ok(names.length > 20);
    for (const path of ["/", ...names.map(([, name]) => `/page/${name}`)]) {
        const first = await fetch(server.url + path);
        assert.equal(first.status, 200, path);
        const [tag, policy] = [first.headers.get("etag"), first.headers.get("content-security-policy")];
        assert.match(policy, /default-src 'none'; script-src 'self'; style-src 'self'/);
        assert.doesNotMatch(policy, /unsafe|https?:|\*/);
        assert.equal(first.headers.get("x-content-type-options"), "nosniff");
        const again = await fetch(server.url + path, { headers: { "If-None-Match": tag } });
        assert.equal(again.status, 304, path);
        assert.equal(await again.text(), "");
        assert.equal((await fetch(server.url + path, { headers: { "If-None-Match": '"old"' } })).status, 200);
        assert.equal((await fetch(server.url + path, { method: "HEAD" })).headers.get("etag"), tag);
    }
    const missing = await fetch(`${server.url}/page/../Cargo.toml%00`);
    assert.equal(missing.status, 404);
    assert.ok((await missing.json()).error.message);
});

test("text appears as it is made", async () => {
    const page = await visit(browser, server.url);
    await set(page, { max_tokens: 300, seed: 3, ignore_eos: true });
    const seen = new Set();
    let ended = false;
    const all = generate(page, "the cat").finally(() => (ended = true));
    while (!ended) {
        seen.add(await page.locator(".list .token").count());
        await sleep(10);
    }
    await all;
    assert.ok(seen.size > 5, `the text was seen with ${[...seen]} tokens`);
    assert.equal(await page.locator(".list .token").count(), 300);
    assert.match(
        await page.locator(".figures").textContent(),
        /^300 tokens · \d+ tokens\/s · first after \d/,
    );
    assert.match(await page.locator(".ending").textContent(), /reached the most tokens/);
    // What tokens show is the text, to the last character, although many of them are parts of characters.
    const { choices } = await ask({ prompt: "the cat", max_tokens: 300, seed: 3, ignore_eos: true });
    assert.equal(await textOf(page), choices[0].text);
    await leave(page);
});

test("stop frees what the server held", async () => {
    const page = await visit(browser, server.url);
    const count = async (name) => (await server.metrics())(name);
    const [pages, cancelled] = [
        await count("ferropt_cache_pages_used"),
        await count("ferropt_cancelled_total"),
    ];
    await set(page, { max_tokens: 2000, n: 20, ignore_eos: true, logprobs: "" });
    await page.fill("#prompt", "the");
    for (const end of ["Escape", "click"]) {
        await page.locator("#prompt").press("Control+Enter");
        await until(
            "texts run",
            async () =>
                (await count("ferropt_running")) > 0 &&
                (await count("ferropt_cache_pages_used")) > pages + 30 &&
                ((await textOf(page)) ?? "").length > 10,
        );
        await finish(page, () =>
            end === "click"
                ? page.getByRole("button", { name: "Stop" }).click()
                : page.keyboard.press("Escape"),
        );
        await until("nothing runs", async () => (await count("ferropt_running")) === 0, 60);
        // What is left in the cache are the beginnings of prompts that the next request finds again.
        await until("pages are free", async () => (await count("ferropt_cache_pages_used")) <= pages + 1, 60);
        assert.match(await page.locator(".ending").first().textContent(), /stopped by you/);
        assert.ok((await textOf(page)).length > 10, "what there was stays");
    }
    assert.equal(await count("ferropt_cancelled_total"), cancelled + 2);
    await leave(page);
});

test("alternatives are shown to the pointer and to the keyboard, and are the API's", async () => {
    const page = await visit(browser, server.url);
    await set(page, { max_tokens: 24, seed: 5, logprobs: 4 });
    await generate(page, "the dog");
    const { choices } = await ask({ prompt: "the dog", max_tokens: 24, seed: 5, logprobs: 4 });
    const place = choices[0].logprobs.tokens.findIndex(
        (name, i) => i > 3 && !name.startsWith("bytes:") && /\w/.test(name),
    );
    const expected = Object.entries(choices[0].logprobs.top_logprobs[place]).sort(([, a], [, b]) => b - a);
    const check = async () => {
        await box(page).waitFor();
        const shown = await box(page).locator("li .share").allTextContents();
        assert.deepEqual(
            shown.map((text) => Number.parseFloat(text).toPrecision(3)),
            expected.map(([, logprob]) =>
                Number.parseFloat(
                    (100 * Math.exp(logprob)).toFixed(100 * Math.exp(logprob) >= 10 ? 1 : 2),
                ).toPrecision(3),
            ),
        );
        assert.match(
            await box(page).locator(".facts").textContent(),
            new RegExp(choices[0].logprobs.token_logprobs[place].toFixed(2)),
        );
    };
    await token(page, place).hover();
    await check();
    await page.mouse.move(5, 5);
    await box(page).waitFor({ state: "hidden" });
    await page.getByRole("listbox").focus();
    await page.keyboard.press("Home");
    for (let i = 0; i < place; i += 1) await page.keyboard.press("ArrowRight");
    await check();
    await page.keyboard.press("Escape");
    await box(page).waitFor({ state: "hidden" });
    // A line further and back, and to the end.
    await page.keyboard.press("End");
    assert.match(await page.getByRole("listbox").getAttribute("aria-activedescendant"), /-23$/);
    // Shades are those of the probabilities.
    const shades = await page
        .locator(".list .token")
        .evaluateAll((all) => all.map(({ className }) => Number(/shade-(\d)/.exec(className)[1])));
    const limits = [0.8, 0.5, 0.2, 0.05, 0];
    assert.deepEqual(
        shades,
        choices[0].logprobs.token_logprobs.map((logprob) =>
            limits.findIndex((limit) => Math.exp(logprob) >= limit),
        ),
    );
    await leave(page);
});

test("an alternative is gone on from, and the version before stays", async () => {
    const page = await visit(browser, server.url);
    const bodies = sent(page);
    await set(page, { max_tokens: 16, seed: 5 });
    await generate(page, "the dog");
    const before = await textOf(page);
    // The first place behind which an alternative is whole characters.
    let place = 3;
    const branches = () => box(page).locator("li button");
    for (; ; place += 1) {
        await token(page, place).click();
        if (await branches().count()) break;
        await page.keyboard.press("Escape");
    }
    const kept = (await page.locator(".list .token").allTextContents()).slice(0, place).join("");
    const name = (await branches().first().locator(".name").textContent())
        .replaceAll("␣", " ")
        .replaceAll("↵", "\n");
    await finish(page, () => branches().first().click());
    assert.equal(bodies[1].prompt, `the dog${kept}${name}`);
    assert.ok((await textOf(page)).startsWith(kept + name));
    assert.equal(await page.locator(".token.kept").count(), place + 1);
    await page.getByRole("button", { name: "Previous version" }).click();
    assert.equal(await textOf(page), before);
    // What is being written meanwhile is no part of the text that is there.
    await page.fill("#prompt", "something else");
    assert.match(await page.locator(".pager").textContent(), /Version 1 of 2/);
    // Regenerate from a token, continue, and take the text into the prompt.
    await token(page, 2).click();
    await finish(page, () => box(page).getByRole("button", { name: "Again from here" }).click());
    assert.equal(
        bodies[2].prompt,
        `the dog${(await page.locator(".list .token").allTextContents()).slice(0, 2).join("")}`,
    );
    const whole = await textOf(page);
    await finish(page, () => page.getByRole("button", { name: "Continue" }).click());
    assert.equal(bodies[3].prompt, `the dog${whole}`);
    assert.ok((await textOf(page)).startsWith(whole) && (await textOf(page)).length > whole.length);
    const longer = await textOf(page);
    await page.getByRole("button", { name: "Use as prompt" }).click();
    assert.equal(await page.locator("#prompt").inputValue(), `the dog${longer}`);
    await leave(page);
});

test("several texts at once", async () => {
    const page = await visit(browser, server.url);
    await set(page, { max_tokens: 12, n: 3, best_of: 5, seed: 1 });
    await generate(page, "on the");
    assert.equal(await page.locator(".text").count(), 3);
    const { choices } = await ask({ prompt: "on the", max_tokens: 12, n: 3, best_of: 5, seed: 1 });
    assert.deepEqual(
        await page.locator(".output .list").allTextContents(),
        choices.map(({ text }) => text),
    );
    await leave(page);
});

test("history outlives the page, opens, is exported and cleared", async () => {
    const page = await visit(browser, server.url);
    await set(page, { max_tokens: 8 });
    await generate(page, "the mat");
    const text = await textOf(page);
    await generate(page, "the log");
    await page.reload();
    assert.equal(await page.locator("#prompt").inputValue(), "the log");
    assert.equal(await page.locator("#set-max_tokens").inputValue(), "8");
    await page.getByRole("button", { name: "History" }).last().click();
    assert.equal(await page.locator(".entry").count(), 2);
    await page.locator(".entry", { hasText: "the mat" }).click();
    assert.equal(await textOf(page), text);
    assert.equal(await page.locator("#prompt").inputValue(), "the mat");
    const [download] = await Promise.all([
        page.waitForEvent("download"),
        page.getByRole("button", { name: "Export" }).click(),
    ]);
    const entries = JSON.parse(readFileSync(await download.path(), "utf8"));
    assert.deepEqual(
        entries.map(({ prompt }) => prompt),
        ["the log", "the mat"],
    );
    assert.equal(entries[1].texts[0].text, text);
    await page.getByRole("button", { name: "Remove: the log" }).click();
    assert.equal(await page.locator(".entry").count(), 1);
    await page.getByRole("button", { name: "Clear", exact: true }).click();
    await page.getByRole("button", { name: "Really clear all" }).click();
    await page.reload();
    await page.getByRole("button", { name: "History" }).last().click();
    assert.equal(await page.locator(".entry").count(), 0);
    await leave(page);
});

test("a browser with no room for history forgets the oldest", async () => {
    const page = await visit(browser, server.url);
    await page.evaluate(() => {
        const entry = (i) => ({
            id: `old-${i}`,
            at: i,
            kind: "completion",
            model: "small",
            prompt: "p".repeat(60_000),
            kept: { text: "", tokens: [] },
            texts: [],
            body: {},
            figures: "",
        });
        localStorage.setItem(
            "ferropt.history",
            JSON.stringify(Array.from({ length: 80 }, (_, i) => entry(i))),
        );
        localStorage.setItem(
            "filled",
            "x".repeat(5 * 1024 * 1024 - JSON.stringify(localStorage).length - 1000),
        );
    });
    await page.reload();
    await set(page, { max_tokens: 200 });
    await generate(page, "new");
    const kept = await page.evaluate(() => JSON.parse(localStorage.getItem("ferropt.history")));
    assert.equal(kept[0].prompt, "new");
    assert.ok(kept.length < 80 && kept.length > 10, `${kept.length} entries`);
    await leave(page);
});

test("what is copied runs", async () => {
    const page = await visit(browser, server.url);
    await set(page, {
        max_tokens: 10,
        greedy: true,
        logprobs: "",
        stop: "it's\\n",
        repetition_penalty: 1.2,
        min_tokens: 10,
    });
    const prompt = `the "cat" isn't $HOME \\ here\nnaïve 🦊`;
    await generate(page, prompt);
    const text = await textOf(page);
    const copied = async (form) => {
        await page.getByRole("button", { name: "Code", exact: true }).click();
        await page.getByRole("button", { name: form, exact: true }).click();
        await page.getByRole("dialog").getByRole("button", { name: "Copy", exact: true }).click();
        await page.getByRole("button", { name: "Copied" }).waitFor();
        await page.keyboard.press("Escape");
        return page.evaluate(() => navigator.clipboard.readText());
    };
    const curl = await copied("curl");
    assert.equal(
        JSON.parse(execSync(curl, { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] })).choices[0].text,
        text,
    );
    const python = await copied("Python");
    const printed = execFileSync(`${scratch}/python/bin/python`, ["-"], {
        input: python,
        encoding: "utf8",
        env: { ...process.env, PYTHONIOENCODING: "utf-8" },
    });
    assert.equal(printed, `${text}\n`);
    const body = JSON.parse(await copied("JSON"));
    assert.equal(body.prompt, prompt);
    assert.deepEqual(body.stop, ["it's\n"]);
    await leave(page);
});

test("every control is a field of the API, within its bounds, and reaches it", async () => {
    const { components } = await (await fetch(`${server.url}/openapi.json`)).json();
    const { properties } = components.schemas.CompletionRequest;
    for (const { name, kind, min, max, local } of FIELDS.filter((field) => !field.local)) {
        assert.ok(properties[name], `the API has no field ${name}`);
        if (kind !== "number" || name === "seed") continue;
        assert.deepEqual([min, max], [properties[name].minimum, properties[name].maximum], name);
    }
    const page = await visit(browser, server.url);
    const bodies = sent(page);
    const values = {
        max_tokens: 6,
        stop: "zz\n\\n",
        temperature: 0.7,
        top_p: 0.9,
        top_k: 40,
        min_p: 0.01,
        seed: 7,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: -0.1,
        logit_bias: '5: -100\n"a" = 3',
        n: 2,
        best_of: 3,
        logprobs: 2,
        min_tokens: 2,
        ignore_eos: true,
    };
    await set(page, values);
    await generate(page, "the");
    const id = (
        await (
            await fetch(`${server.url}/tokenize`, {
                method: "POST",
                headers: { "Content-Type": "application/json" },
                body: JSON.stringify({ prompt: "a", add_special_tokens: false }),
            })
        ).json()
    ).tokens[0];
    const expected = {
        ...values,
        stop: ["zz", "\n"],
        logit_bias: { 5: -100, [id]: 3 },
        model: "small",
        prompt: "the",
        stream: true,
        stream_options: { include_usage: true },
    };
    assert.deepEqual(bodies[0], expected);
    assert.equal(await page.locator(".text").count(), 2);
    // The rest, which goes without those.
    await page.getByRole("button", { name: "Reset all" }).click();
    await set(page, { beams: 3, length_penalty: 0.5, greedy: true, max_tokens: 5 });
    await generate(page, "the");
    assert.deepEqual([bodies[1].beams, bodies[1].length_penalty, bodies[1].temperature], [3, 0.5, 0]);
    assert.ok((await textOf(page)).length > 0);
    // The model's other name.
    await page.locator("#model").selectOption("other");
    await page.getByRole("button", { name: "Reset all" }).click();
    await set(page, { max_tokens: 2 });
    await generate(page, "the");
    assert.equal(bodies[2].model, "other");
    await leave(page);
});

/** From now on texts are these tokens, as if the model had written them, each with an alternative. */
async function written(page, tokens, other) {
    const logprobs = (name) => ({
        tokens: [name],
        token_logprobs: [-1],
        top_logprobs: [{ [name]: -1, [other]: -2 }],
        text_offset: [0],
    });
    const chunk = (name) =>
        `data: ${JSON.stringify({ choices: [{ index: 0, text: name, logprobs: logprobs(name), finish_reason: null }] })}\n\n`;
    await page.route("**/v1/completions", (route) =>
        route.fulfill({
            contentType: "text/event-stream",
            body: `${tokens.map(chunk).join("")}data: [DONE]\n\n`,
        }),
    );
}

test("tokens that take no room can be pointed at", async () => {
    const page = await visit(browser, server.url);
    await set(page, { max_tokens: 4 });
    const tokens = ["e", "\u0301", "\u05c4", "\u200b", "\u0001", "a"];
    await written(page, tokens, "x");
    await generate(page, "x");
    assert.equal(await textOf(page), tokens.join(""));
    for (let place = 0; place < tokens.length; place += 1) {
        await token(page, place).click({ timeout: 5000 });
        await box(page).waitFor();
        await page.keyboard.press("Escape");
    }
    await leave(page);
});

test("what a model writes stays text", async () => {
    const page = await visit(browser, server.url);
    const evil = `<img src=x onerror="window.evil=1"><script>window.evil=1</script>`;
    await set(page, { max_tokens: 4 });
    await generate(page, evil);
    await page.getByRole("button", { name: "History" }).last().click();
    assert.ok((await page.locator(".entry").first().textContent()).includes("<img src=x"));
    await page.getByRole("button", { name: "Settings" }).last().click();
    await written(
        page,
        [
            "<img src=x",
            ' onerror="window.evil=1">',
            "<script>window.evil=1</script>",
            "<svg/onload=evil=1>",
        ],
        "<b onmouseover=evil=1>",
    );
    await generate(page, "x");
    assert.equal(
        await textOf(page),
        `<img src=x onerror="window.evil=1"><script>window.evil=1</script><svg/onload=evil=1>`,
    );
    await token(page, 1).click();
    assert.ok((await box(page).textContent()).includes("<b␣onmouseover=evil=1>"));
    assert.equal(await page.evaluate(() => window.evil), undefined);
    assert.equal(await page.locator("img").count(), 1, "the page's own");
    await leave(page);
});
