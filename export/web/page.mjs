// The page: a sample in, the solve at every budget out.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { classes, residuals } from "./charts.mjs";
import { clear, listen, putImage, sampleOf, show } from "./drawing.mjs";
import { Model, compare, readNpy } from "./fedeq.mjs";

const EXAMPLE = "../example/";
const LARGEST_BUDGET = 30;
const FRAME_MS = 350;
const MOST_SAMPLES = 20;

const element = (id) => document.getElementById(id);
const state = { model: null, sample: null, solves: [], stop: null, playing: null, queued: false, solving: false };

ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send, and gain nothing here
ort.env.logLevel = "error";

async function start() {
  element("budget").max = LARGEST_BUDGET;
  element("budget").addEventListener("input", () => (pause(), render()));
  element("play").addEventListener("click", () => (state.playing === null ? play() : pause()));
  element("clear").addEventListener("click", () => (clear(element("pad")), draw()));
  element("sample-file").addEventListener("change", reads(loadSample));
  element("model-file").addEventListener("change", reads(async (file) => use(await bytesOf(file), [])));
  listen(element("pad"), draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => clear(element("pad")));
  window.addEventListener("resize", render);
  const samples = rows(readNpy(await fetched("samples.npy")));
  await use(await fetched("model.onnx"), samples);
  await check(samples);
}

// A handler of a file input that reports what goes wrong instead of throwing it away.
function reads(take) {
  return async (event) => {
    const [file] = event.target.files;
    if (file === undefined) return;
    try {
      await take(file);
    } catch (error) {
      tell(`${file.name}: ${error.message}`, true);
    }
  };
}

async function bytesOf(file) {
  return new Uint8Array(await file.arrayBuffer());
}

async function fetched(name) {
  const response = await fetch(EXAMPLE + name);
  if (!response.ok) throw new Error(`${name} is not where it should be (${response.status}); serve the folder export/`);
  return new Uint8Array(await response.arrayBuffer());
}

async function use(bytes, samples) {
  const model = await Model.load(ort, bytes);
  if (model.unrolled) throw new Error("unrolled for one budget; export it with recipe onnxruntime to watch its solve");
  pause();
  Object.assign(state, { model, sample: null, solves: [] });
  const drawable = model.shape.length === 3 && model.shape[0] === 1;
  element("pad").parentElement.hidden = element("clear").hidden = !drawable;
  clear(element("pad"));
  offer(samples);
  if (samples.length) await choose(samples.at(2));
  else tell(drawable ? "Draw something." : `Load a sample of shape (${model.shape.join(", ")}).`);
}

// Samples of a batch, or the one that there is.
function rows({ data, shape }) {
  const expected = state.model?.shape ?? shape.slice(1);
  const size = expected.reduce((product, length) => product * length, 1);
  if (data.length % size || data.length === 0) throw new Error(`samples need the shape (${expected.join(", ")})`);
  const count = Math.min(MOST_SAMPLES, data.length / size);
  return Array.from({ length: count }, (_, i) => ({ data: data.slice(i * size, (i + 1) * size), shape: expected }));
}

function offer(samples) {
  element("samples").replaceChildren(
    ...samples.map((sample, i) => {
      const [button, canvas] = [document.createElement("button"), document.createElement("canvas")];
      button.type = "button";
      button.setAttribute("aria-label", `Sample ${i}`);
      show(canvas, sample);
      button.append(canvas);
      button.addEventListener("click", () => (clear(element("pad")), choose(sample)));
      return button;
    }),
  );
}

async function loadSample(file) {
  if (state.model === null) throw new Error("there is no model yet");
  if (!file.name.endsWith(".npy")) {
    if (element("clear").hidden) throw new Error("this model takes no images; load an .npy");
    await putImage(element("pad"), file);
    return draw();
  }
  const samples = rows(readNpy(await bytesOf(file)));
  offer(samples);
  return choose(samples[0]);
}

function draw() {
  if (state.model === null) return;
  const sample = sampleOf(element("pad"), state.model.shape);
  if (sample !== null) choose(sample);
}

// Solve for this sample at every budget; while one is being solved for, only the latest other one waits.
async function choose(sample) {
  state.sample = sample;
  show(element("seen"), sample);
  element("seen-size").textContent = `what the model sees: ${sample.shape.join(" × ")}`;
  state.queued = true;
  if (state.solving) return;
  state.solving = true;
  try {
    while (state.queued) {
      state.queued = false;
      await solve();
    }
  } finally {
    state.solving = false;
  }
}

async function solve() {
  const { model, sample } = state;
  const solves = [];
  for (let K = 1; K <= LARGEST_BUDGET; K++) solves.push((await model.infer(sample, { maxIter: K, tol: 0 }))[0]);
  const [stop] = await model.infer(sample, { maxIter: LARGEST_BUDGET });
  if (model !== state.model) return;
  Object.assign(state, { solves, stop });
  render();
}

function render() {
  const K = Number(element("budget").value);
  element("budget-shown").textContent = K;
  if (!state.solves.length) return;
  const { model, solves, stop } = state;
  const answer = solves[K - 1];
  if (answer.label === null) return tell("The sample holds numbers that are not finite: no answer.", true);
  const probabilities = solves.map(({ logits }) => softmax(logits));
  const bounds = model.certificate === null ? null : solves.map((_, i) => model.bound(i + 1));
  element("bound-key").hidden = bounds === null;
  bars(probabilities[K - 1], model.labels);
  residuals(element("residuals"), { path: solves.map(({ residual }) => residual), bounds, tol: model.tol, chosen: K });
  classes(element("classes"), { probabilities, labels: model.labels, chosen: K });
  const share = Math.max(...probabilities[K - 1]);
  const reached = stop.residual <= model.tol;
  const end = reached ? `stops by itself after ${stop.iterations}` : `does not stop within ${LARGEST_BUDGET}`;
  tell(
    `After ${K} evaluation${K > 1 ? "s" : ""}: “${answer.label}” with ${(100 * share).toFixed(1)} %, ` +
      `residual ${answer.residual.toExponential(1)}. At a tolerance of ${model.tol} the solver ${end}.`,
  );
}

function bars(shares, labels) {
  element("bars").replaceChildren(
    ...labels.map((label, i) => {
      const [row, name, meter, share] = ["div", "span", "meter", "span"].map((tag) => document.createElement(tag));
      name.textContent = label;
      meter.value = shares[i];
      meter.setAttribute("aria-label", label);
      share.textContent = `${(100 * shares[i]).toFixed(1)} %`;
      row.append(name, meter, share);
      return row;
    }),
  );
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const weights = Array.from(logits, (value) => Math.exp(value - largest));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  return weights.map((weight) => weight / sum);
}

function play() {
  element("play").textContent = "Pause";
  element("budget").value = 1;
  render();
  state.playing = setInterval(() => {
    element("budget").value = Number(element("budget").value) + 1;
    render();
    if (Number(element("budget").value) >= LARGEST_BUDGET) pause();
  }, FRAME_MS);
}

function pause() {
  clearInterval(state.playing);
  state.playing = null;
  element("play").textContent = "Play";
}

function tell(text, bad = false) {
  element("told").textContent = text;
  element("told").classList.toggle("bad", bad);
}

// Whether this browser answers as the machine did that made the example.
async function check(samples) {
  const answers = [];
  for (const sample of samples) answers.push(...(await state.model.infer(sample)));
  const { difference, agrees } = compare(answers, readNpy(await fetched("logits.npy")));
  const shown = element("check");
  shown.dataset.state = agrees ? "agrees" : "failed";
  shown.textContent = agrees
    ? `This browser gives the stored answers of the example: the largest difference of a logit is ${difference.toExponential(1)}.`
    : `This browser's answers differ from the stored ones of the example: by ${difference.toExponential(1)} of a logit.`;
}

try {
  await start();
} catch (error) {
  tell(`${error.message}`, true);
  element("check").dataset.state = "failed";
}
