// Answer with an exported fedeq-edge model: needs onnxruntime-node, and ../web/fedeq.mjs.
//
//     node run.mjs model.onnx samples.npy [--max-iter K] [--tol T] [--check logits.npy]
//
// samples.npy: one sample or a batch of them, float32. One line of JSON per sample on stdout. --check: stored logits
// of the same samples; exit 1 where ours differ by more than 1e-5 of the largest of them.

import { readFile } from "node:fs/promises";
import { parseArgs } from "node:util";
import { Model, compare, readNpy } from "../web/fedeq.mjs";

const USAGE = "usage: node run.mjs model.onnx samples.npy [--max-iter K] [--tol T] [--check logits.npy]";

process.env.ORT_DISABLE_TELEMETRY = "1"; // has to be set before onnxruntime is loaded
const ort = await import("onnxruntime-node");

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { "max-iter": { type: "string" }, tol: { type: "string" }, check: { type: "string" } },
  });
  if (positionals.length !== 2) throw new Error(USAGE);
  const model = await Model.load(ort, await readFile(positionals[0]));
  const samples = readNpy(await readFile(positionals[1]));
  const answers = await model.infer(samples, { maxIter: number(values["max-iter"]), tol: number(values.tol) });
  for (const { label, iterations, residual } of answers) {
    console.log(JSON.stringify({ label, iterations, residual })); // infinity becomes null
  }
  return values.check === undefined || agrees(answers, readNpy(await readFile(values.check)));
}

function number(text) {
  if (text === undefined) return undefined;
  if (!(Number(text) >= 0)) throw new Error(`${text} is no number of at least 0`);
  return Number(text);
}

function agrees(answers, stored) {
  const found = compare(answers, stored);
  console.error(`largest difference from the stored logits: ${found.difference}`);
  return found.agrees;
}

try {
  process.exitCode = (await main()) ? 0 : 1;
} catch (error) {
  console.error(`run.mjs: ${String(error.message).split("\n")[0]}`);
  process.exitCode = 1;
}
