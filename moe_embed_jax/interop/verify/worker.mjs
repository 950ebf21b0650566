// Embeds texts by one runtime of Node.js, in a process of its own: see worker.py, whose request
// and answer it shares. Runs where the packages are installed: node --input-type=module --eval.
import fs from "node:fs";

const request = JSON.parse(fs.readFileSync(0, "utf-8"));

async function run(encode, tokenize, version) {
    const vectors = [], times = [], refused = {};
    for (const [i, text] of request.texts.entries()) {
        try {
            vectors.push(await encode(text));
            const start = performance.now();
            if (i < 10) await encode(text);
            if (i < 10) times.push(performance.now() - start);
        } catch (error) {
            vectors.push(null);
            refused[i] = String(error.message ?? error).split("\n")[0];
        }
    }
    const ids = request.texts.map(tokenize);
    const ms = times.sort((a, b) => a - b)[Math.floor(times.length / 2)] ?? 0;
    return {version, ids, vectors, ms, refused};
}

const runtimes = {
    "transformers.js": async () => {
        const library = await import("@huggingface/transformers");
        library.env.allowRemoteModels = false;
        library.env.localModelPath = "";
        const pipe = await library.pipeline("feature-extraction", request.folder, {dtype: "fp32"});
        const pooling = {mean: "mean", cls: "cls", last: "last_token"}[request.pooling];
        // A batch of two of different lengths, so that the text is padded like in use.
        const encode = async (text) => {
            const found = await pipe([text, text + " and more"], {pooling, normalize: true});
            return found.tolist()[0];
        };
        const tokenize = (text) => {
            const ids = pipe.tokenizer(text, {truncation: true}).input_ids;
            return ids.tolist()[0].map(Number);
        };
        return run(encode, tokenize, library.env.version);
    },
    "llama.cpp": async () => {
        // The package tries its binary in a process of its own, which takes over the options of
        // this one, and --input-type is refused there.
        process.execArgv = [];
        const {getLlama} = await import("node-llama-cpp");
        const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
        const model = await llama.loadModel({modelPath: request.file});
        const context = await model.createEmbeddingContext({contextSize: "auto"});
        const norm = (x) => Math.hypot(...x);
        const ids = (text) => {
            const found = [...model.tokenize(text)].map(Number);
            const {bos, eos, shouldPrependBosToken, shouldAppendEosToken} = model.tokens;
            if (shouldPrependBosToken && found[0] !== bos) found.unshift(bos);
            if (shouldAppendEosToken && found.at(-1) !== eos) found.push(eos);
            return found;
        };
        const encode = async (text) => {
            // Of a text the package would leave out the start token, which llama.cpp itself adds.
            const vector = [...(await context.getEmbeddingFor(ids(text))).vector];
            const length = norm(vector);
            return vector.map((x) => x / length);
        };
        const type = model.fileInfo.metadata?.general?.file_type;
        const precision = {0: "float32", 1: "half", 32: "half"}[type] ?? "int8";
        const version = `${llama.llamaCppRelease?.release ?? "?"}, ${precision}`;
        return {...await run(encode, ids, version), precision};
    },
};

let answer;
try {
    answer = await runtimes[request.runtime]();
} catch (error) {
    if (error.code !== "ERR_MODULE_NOT_FOUND") throw error;
    answer = {missing: error.message.split("\n")[0]};
}
const bytes = Buffer.from(`\nverify-result ${JSON.stringify(answer)}\n`);
for (let done = 0; done < bytes.length;) {  // a pipe takes 64 KiB at once, or nothing when full
    try {
        done += fs.writeSync(1, bytes, done);
    } catch (error) {
        if (error.code !== "EAGAIN") throw error;
    }
}
process.exit(0);
