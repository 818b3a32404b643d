// Chat, status, faults, and whether everybody can use the page.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import test, { after, before } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import {
    accessibility,
    finish,
    fits,
    generate,
    launch,
    leave,
    scratch,
    serve,
    set,
    textOf,
    until,
    visit,
} from "./lab.mjs";

let browser, server;
before(async () => {
    [browser, server] = [await launch(), await serve()];
});
after(async () => {
    await browser?.close();
    await server?.stop();
});

const box = (page) => page.getByRole("dialog", { name: /Alternatives/ });

test("a conversation", async () => {
    const page = await visit(browser, server.url, {}, "chat");
    const bodies = [];
    page.on(
        "request",
        (request) => request.url().endsWith("/v1/chat/completions") && bodies.push(request.postDataJSON()),
    );
    await set(page, { max_tokens: 12, min_tokens: 12, seed: 2 });
    await page.getByText("How the conversation is introduced").click();
    await page.fill("#system", "Two people talk.");
    await page.fill("#draft", "hello there");
    await finish(page, () => page.keyboard.press("Control+Enter"));
    const reply = page.locator(".turn.text").last();
    const text = await reply.locator(".list").textContent();
    assert.ok(text.length > 0);
    assert.deepEqual(bodies[0].messages, [
        { role: "system", content: "Two people talk." },
        { role: "user", content: "hello there" },
    ]);
    await reply.locator(".token").nth(3).click();
    assert.ok((await box(page).locator("li").count()) >= 5);
    assert.equal(await box(page).getByRole("button").count(), 0, "a conversation has no branches");
    await page.keyboard.press("Escape");
    await page.fill("#draft", "and then?");
    await finish(page, () => page.keyboard.press("Control+Enter"));
    assert.equal(bodies[1].messages.length, 4);
    assert.equal(bodies[1].messages[2].content, text);
    await finish(page, () => page.getByRole("button", { name: "Regenerate" }).click());
    assert.deepEqual(bodies[2].messages, bodies[1].messages);
    // It is one entry of the history, and comes back from there.
    await page.getByRole("button", { name: "New conversation" }).click();
    assert.equal(await page.locator(".turn").count(), 0);
    await page.reload();
    await page.getByRole("button", { name: "History" }).last().click();
    assert.equal(await page.locator(".entry").count(), 1);
    await page.locator(".entry").click();
    assert.equal(await page.locator(".turn").count(), 4);
    // What was said is taken back to be said otherwise.
    await page.getByRole("button", { name: "Edit" }).first().click();
    assert.equal(await page.locator(".turn").count(), 0);
    assert.equal(await page.locator("#draft").inputValue(), "hello there");
    await leave(page);
});

test("where no other reply comes, the one that was there stays", async () => {
    const page = await visit(browser, server.url, {}, "chat");
    await set(page, { max_tokens: 12, min_tokens: 12, seed: 2 });
    await page.fill("#draft", "hello there");
    await finish(page, () => page.keyboard.press("Control+Enter"));
    const reply = page.locator(".turn.text").last();
    const said = await reply.locator(".list").textContent();
    await page.route("**/v1/chat/completions", (route) =>
        route.fulfill({ status: 400, json: { error: { message: "no", type: "x", param: null, code: "x" } } }),
    );
    await finish(page, () => page.getByRole("button", { name: "Regenerate" }).click());
    assert.equal(await page.locator(".turn").count(), 2);
    assert.equal(await reply.locator(".list").textContent(), said);
    await leave(page, /status of 400/);
});

test("the status moves", async () => {
    const page = await visit(browser, server.url, {}, "status");
    const value = (title, label) =>
        page
            .locator(".plot", { hasText: title })
            .locator("dl > div", { hasText: label })
            .locator("dd")
            .textContent();
    assert.match(await page.locator("tbody").textContent(), /small.*ready.*2048/);
    assert.match(await page.locator("tbody").textContent(), /other is small/);
    await page.locator(".plot canvas").first().waitFor();
    const drawn = () =>
        page.locator(".plot canvas").evaluateAll((all) => all.map((canvas) => canvas.toDataURL()));
    await sleep(1500);
    const idle = await drawn();
    assert.equal(idle.length, 6);
    assert.equal(await value("Texts", "running"), "0");
    const load = new AbortController();
    const body = JSON.stringify({ prompt: "the", max_tokens: 2000, n: 16, ignore_eos: true, stream: true });
    const answer = await fetch(`${server.url}/v1/completions`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body,
        signal: load.signal,
    });
    const read = (async () => {
        for await (const _ of answer.body);
    })().catch(() => {});
    await until("running", async () => (await value("Texts", "running")) === "16");
    await until(
        "tokens a second",
        async () => Number.parseFloat(await value("Tokens a second", "generated")) > 1,
    );
    await until("time to the first token", async () =>
        /^[\d.]+ m?s$/.test(await value("Time to the first token", "median")),
    );
    await until("time between tokens", async () =>
        /^[\d.]+ [mµ]?s$/.test(await value("Time between tokens", "95 % within")),
    );
    await until("cache", async () => Number.parseFloat(await value("Cache in use", "of all pages")) > 0);
    const busy = await drawn();
    busy.forEach((picture, i) => assert.notEqual(picture, idle[i], `plot ${i} stands still`));
    assert.match(
        await page.locator(".plot", { hasText: "Texts" }).getByRole("img").getAttribute("aria-label"),
        /running 16/,
    );
    load.abort();
    await read;
    await until("nothing runs", async () => (await value("Texts", "running")) === "0");
    // Curves stay when one looks elsewhere meanwhile.
    await page.keyboard.press("Alt+1");
    await page.locator("#prompt").waitFor();
    await page.keyboard.press("Alt+3");
    await page.locator(".plot canvas").first().waitFor();
    await leave(page);
});

test("errors stand where they belong", async () => {
    const page = await visit(browser, server.url);
    const refused = /status of 4/;
    await page.getByRole("button", { name: /^Generate/ }).click();
    assert.match(await page.locator("#prompt-wrong").textContent(), /Write something/);
    await page.fill("#prompt", "the");
    // Found by the page.
    await set(page, { top_p: "1.5" });
    await page.locator("#prompt").press("Control+Enter");
    assert.match(await page.locator("#set-top_p-wrong").textContent(), /1\.5 is not a number from 0 to 1/);
    // The focus moves once the message has been drawn.
    await page.waitForFunction(() => document.activeElement.id === "set-top_p");
    assert.equal(await page.locator("#set-top_p").getAttribute("aria-invalid"), "true");
    await page.fill("#set-top_p", "1");
    assert.equal(await page.locator(".wrong").count(), 0);
    // Found by the server.
    await set(page, { n: 3, best_of: 2 });
    await page.locator("#prompt").press("Control+Enter");
    await page.locator("#set-best_of-wrong").waitFor();
    assert.match(await page.locator("#set-best_of-wrong").textContent(), /best_of/);
    await page.getByRole("button", { name: "Reset all" }).click();
    await page.fill("#prompt", "the ".repeat(3000));
    await page.locator("#prompt").press("Control+Enter");
    await page.locator("#prompt-wrong").waitFor();
    assert.match(await page.locator("#prompt-wrong").textContent(), /2048/);
    await leave(page, refused);
});

test("a busy server is asked again when it says so", async () => {
    const page = await visit(browser, server.url);
    let times = 0;
    await page.route("**/v1/completions", async (route) => {
        times += 1;
        if (times > 2) return route.fallback();
        const error = {
            message: "256 prompts wait for the model, which is the limit",
            type: "rate_limit_error",
            param: null,
            code: "queue_full",
        };
        return route.fulfill({
            status: 429,
            headers: { "Retry-After": times === 1 ? "1" : "600" },
            json: { error },
        });
    });
    await set(page, { max_tokens: 4 });
    await page.fill("#prompt", "the");
    await page.locator("#prompt").press("Control+Enter");
    await page.getByText(/Trying again in 1 s/).waitFor();
    await page.getByText(/Trying again in 600 s/).waitFor();
    assert.match(await page.locator(".notice").textContent(), /256 prompts wait/);
    await finish(page, () => page.getByRole("button", { name: "Try now" }).click());
    assert.equal(times, 3);
    assert.ok((await textOf(page)).length > 0);
    assert.equal(await page.locator(".notice").count(), 0);
    // Waiting is given up.
    times = 1;
    await page.locator("#prompt").press("Control+Enter");
    await page.getByText(/Trying again in 600 s/).waitFor();
    await page.keyboard.press("Escape");
    await page.getByRole("button", { name: /^Generate/ }).waitFor();
    assert.equal(times, 2);
    await leave(page, /status of 429/);
});

test("a server that dies in mid-text leaves what there was, and is missed until it is back", async () => {
    const own = await serve();
    const page = await visit(browser, own.url);
    await set(page, { max_tokens: 2000, n: 8, ignore_eos: true });
    await page.fill("#prompt", "the");
    await page.locator("#prompt").press("Control+Enter");
    await until("some text", async () => (await page.locator(".list .token").count()) > 20);
    await own.stop();
    await page.getByText(/connection to the server was lost.*What had arrived is kept/).waitFor();
    assert.ok((await page.locator(".list .token").count()) > 20);
    await page.getByText("The server does not answer").waitFor();
    const back = await serve("--port", new URL(own.url).port);
    await page.getByText("The server does not answer").waitFor({ state: "hidden" });
    await set(page, { max_tokens: 10, n: 1 });
    const kept = await textOf(page);
    await finish(page, () => page.getByRole("button", { name: "Go on from here" }).click());
    assert.ok((await textOf(page)).startsWith(kept) && (await textOf(page)).length > kept.length);
    await back.stop();
    await leave(page, /ERR_|Failed to load/);
});

test("a key is asked for, and is forgotten with the tab", async () => {
    const [key, line] = makeKey();
    const file = join(scratch, "keys");
    writeFileSync(file, line);
    const own = await serve("--api-keys", file);
    const page = await visit(browser, own.url);
    const form = page.locator(".notice", { hasText: "The server wants an API key" });
    await form.waitFor();
    await form.getByLabel("API key").fill("fo-wrong");
    await form.getByRole("button", { name: "Use it" }).click();
    await form.getByText(/not known/).waitFor();
    await form.getByLabel("API key").fill(key);
    await page.keyboard.press("Enter");
    await form.waitFor({ state: "hidden" });
    await set(page, { max_tokens: 4 });
    await generate(page, "the");
    assert.ok((await textOf(page)).length > 0);
    assert.equal(
        await page.evaluate(() => JSON.stringify(localStorage)).then((all) => all.includes(key)),
        false,
    );
    await page.getByRole("button", { name: "Code", exact: true }).click();
    assert.match(await page.locator(".code").textContent(), /\$FERROPT_API_KEY/);
    assert.ok(!(await page.content()).includes(key));
    await page.keyboard.press("Escape");
    await page.keyboard.press("Alt+3");
    await page.locator(".plot canvas").first().waitFor();
    await page.getByRole("button", { name: "Key set" }).click();
    await page.getByRole("button", { name: "Forget the key in use" }).click();
    await form.waitFor();
    await own.stop();
    await leave(page, /status of 401/);
});

function makeKey() {
    const { FERROPT } = process.env;
    const [key, line] = [join(scratch, "key.txt"), join(scratch, "line.txt")];
    execFileSync("sh", ["-c", `"${FERROPT}" serve key tester > "${line}" 2> "${key}"`]);
    const read = (file) => execFileSync("cat", [file], { encoding: "utf8" });
    return [/fo-[0-9a-f]+/.exec(read(key))[0], read(line)];
}

test("the keyboard alone is enough", async () => {
    const page = await visit(browser, server.url);
    const focused = () =>
        page.evaluate(() => {
            const element = document.activeElement;
            const visible =
                getComputedStyle(element).outlineStyle !== "none" ||
                getComputedStyle(element.closest(".composer") ?? element).outlineStyle !== "none";
            return {
                name:
                    element.id ||
                    element.getAttribute("aria-label") ||
                    element.textContent.trim() ||
                    element.placeholder,
                visible,
            };
        });
    const tabTo = async (name) => {
        for (let i = 0; i < 80; i += 1) {
            await page.keyboard.press("Tab");
            const at = await focused();
            assert.ok(at.visible, `the focus cannot be seen on ${at.name}`);
            if (name.test(at.name)) return;
        }
        assert.fail(`Tab does not reach ${name}`);
    };
    await tabTo(/^To the content$/);
    await page.keyboard.press("Enter");
    await tabTo(/^prompt$/);
    await page.keyboard.type("the dog");
    await tabTo(/^set-max_tokens$/);
    await page.keyboard.press("Control+A");
    await page.keyboard.type("12");
    await page.keyboard.press("ArrowUp");
    await tabTo(/^set-seed$/);
    await page.keyboard.type("5");
    await finish(page, () => page.keyboard.press("Control+Enter"));
    assert.equal(await page.locator(".list .token").count(), 13);
    await page.locator("#prompt").focus();
    await tabTo(/^Tokens of the text$/);
    await box(page).waitFor();
    // The first place that has something to branch to.
    for (let i = 0; i < 10; i += 1) {
        if (await box(page).locator("li button").count()) break;
        await page.keyboard.press("ArrowRight");
        // The box follows with the next frame.
        await page.evaluate(() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn))));
    }
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => document.activeElement.closest("li") !== null);
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("ArrowUp");
    await finish(page, () => page.keyboard.press("Enter"));
    await page.getByText("Version 2 of 2").waitFor();
    await finish(page, () => page.keyboard.press("Control+Shift+Enter"));
    await page.getByText("Version 3 of 3").waitFor();
    // Help, by its key, and back to where one was.
    await page.getByRole("listbox").focus();
    await page.keyboard.press("?");
    await page.getByRole("dialog", { name: "Help" }).waitFor();
    await page.keyboard.press("Escape");
    await page.getByRole("dialog", { name: "Help" }).waitFor({ state: "hidden" });
    for (const [key, view] of [
        ["2", "chat"],
        ["3", "status"],
        ["1", "complete"],
    ]) {
        await page.keyboard.press(`Alt+${key}`);
        await page.locator(`main.${view}`).waitFor();
    }
    await leave(page);
});

test("screen readers are told what happens", async () => {
    const page = await visit(browser, server.url);
    const said = page.locator('[role="status"]');
    assert.equal(await said.count(), 1);
    await set(page, { max_tokens: 5, logprobs: "" });
    await generate(page, "the");
    await until("the end is said", async () => (await said.textContent()).startsWith("Done. "));
    assert.ok((await said.textContent()).includes((await textOf(page)).trim()));
    // Without alternatives a text is one paragraph.
    assert.equal(await page.getByRole("listbox").count(), 0);
    await leave(page);
});

for (const [width, height, touch] of [
    [1280, 860, false],
    [360, 740, true],
]) {
    for (const colorScheme of ["light", "dark"]) {
        test(`nothing is wrong for axe, and everything fits: ${width} pixels, ${colorScheme}`, async () => {
            const page = await visit(browser, server.url, {
                viewport: { width, height },
                colorScheme,
                hasTouch: touch,
                isMobile: touch,
            });
            const look = async (where) => {
                await accessibility(page, where);
                await fits(page, where);
            };
            await look("empty");
            await page.evaluate(() =>
                localStorage.setItem("ferropt.settings", JSON.stringify({ max_tokens: 24 })),
            );
            await page.reload();
            if (touch) {
                await page.getByRole("button", { name: "Settings" }).tap();
                await look("settings");
                await page.getByRole("button", { name: "Close" }).tap();
                assert.equal(await page.locator(".side.over").count(), 0);
            }
            await page.fill("#prompt", "the dog ".repeat(30) + "a".repeat(300));
            await finish(page, () => page.getByRole("button", { name: /^Generate/ }).click());
            await look("a text");
            const token = page.locator(".list .token").nth(9);
            await (touch ? token.tap() : token.click());
            await box(page).waitFor();
            await look("alternatives");
            const { x, width: wide } = await box(page).boundingBox();
            assert.ok(x >= 0 && x + wide <= width, `alternatives from ${x} to ${x + wide} of ${width}`);
            await page.keyboard.press("Escape");
            await page.getByRole("button", { name: "Code", exact: true }).click();
            await look("copy");
            await page.keyboard.press("Escape");
            await page.getByRole("button", { name: "Help" }).click();
            await look("help");
            await page.keyboard.press("Escape");
            await page.getByRole("button", { name: "Key" }).click();
            await look("key");
            await page.keyboard.press("Escape");
            await page.getByRole("button", { name: "History" }).last().click();
            await look("history");
            if (touch) await page.getByRole("button", { name: "Close" }).tap();
            await page.goto(`${server.url}/#chat`);
            await page.fill("#draft", "hello");
            await finish(page, () => page.getByRole("button", { name: /^Send/ }).click());
            await look("chat");
            await page.goto(`${server.url}/#status`);
            await page.locator(".plot canvas").first().waitFor();
            await sleep(1500);
            await look("status");
            await leave(page);
        });
    }
}

test("colours are the system's, or those that were chosen", async () => {
    const page = await visit(browser, server.url, { colorScheme: "dark" });
    const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const dark = await background();
    await page.getByRole("button", { name: "Colours: As the system" }).click();
    const light = await background();
    assert.notEqual(light, dark);
    await page.reload();
    assert.equal(await background(), light);
    await page.getByRole("button", { name: "Colours: Light" }).click();
    assert.equal(await background(), dark);
    await page.emulateMedia({ colorScheme: "light" });
    assert.equal(await background(), dark);
    await page.getByRole("button", { name: "Colours: Dark" }).click();
    assert.equal(await background(), light);
    await leave(page);
});
