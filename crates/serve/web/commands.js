// A request as something to run elsewhere.

/** Paths of the API, and how the `openai` package calls them. */
const KINDS = {
    completion: { path: "/v1/completions", call: "completions", show: "choice.text" },
    chat: { path: "/v1/chat/completions", call: "chat.completions", show: "choice.message.content" },
};

/** Fields that the `openai` package has as arguments. Others go into its `extra_body`. */
const ARGUMENTS = {
    completion:
        "model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop " +
        "stream stream_options temperature top_p user",
    chat:
        "model messages frequency_penalty logit_bias logprobs max_completion_tokens max_tokens n presence_penalty " +
        "seed stop stream stream_options temperature top_logprobs top_p user",
};

/** The request's body. */
export function asJson(body) {
    return JSON.stringify(body, null, 2);
}

/** A command of a POSIX shell. A key is taken from the environment, so that it is in no history. */
export function asCurl(origin, kind, body, withKey) {
    const key = withKey ? ` \\\n  -H "Authorization: Bearer $FERROPT_API_KEY"` : "";
    const type = ` \\\n  -H 'Content-Type: application/json'`;
    return `curl ${quoted(origin + KINDS[kind].path)}${type}${key} \\\n  -d ${quoted(asJson(body))}\n`;
}

/** Within single quotes a shell changes nothing; a single quote itself has to stand outside of them. */
export function quoted(text) {
    return /^[\w./:@%+=-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}

/** A program for the `openai` package. */
export function asPython(origin, kind, body, withKey) {
    const known = new Set(ARGUMENTS[kind].split(" "));
    const fields = Object.entries(body);
    const lines = fields
        .filter(([name]) => known.has(name))
        .map(([name, value]) => `    ${name}=${literal(value)},`);
    const extra = fields.filter(([name]) => !known.has(name));
    if (extra.length) lines.push(`    extra_body=${literal(Object.fromEntries(extra))},`);
    const { call, show } = KINDS[kind];
    const key = withKey ? `os.environ["FERROPT_API_KEY"]` : `"none"`;
    return `${withKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${literal(`${origin}/v1`)}, api_key=${key})
answer = client.${call}.create(
${lines.join("\n")}
)
for choice in answer.choices:
    print(${show})
`;
}

/** A value as Python writes it. */
export function literal(value) {
    if (value === null || value === undefined) return "None";
    if (value === true) return "True";
    if (value === false) return "False";
    if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
    if (typeof value === "object") {
        return `{${Object.entries(value)
            .map(([name, one]) => `${literal(name)}: ${literal(one)}`)
            .join(", ")}}`;
    }
    // Escapes of JSON's strings mean the same in Python's.
    return JSON.stringify(value);
}
