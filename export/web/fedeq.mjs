// An exported fedeq-edge model behind onnxruntime's JavaScript API; for the browser and for node.

const AGREEMENT = 1e-5;
const SCHEMA_VERSION = "1"; // major version of the metadata that this module reads

// A model out of the bytes of its file. ort: the module onnxruntime-web or onnxruntime-node.
export class Model {
  static async load(ort, bytes) {
    const told = metadata(bytes);
    const version = told.get("fedeq.schema_version");
    if (version === undefined) throw new Error("not a model that fedeq model export has written");
    if (version.split(".")[0] !== SCHEMA_VERSION) {
      throw new Error(`the model has schema version ${version}, this runner reads ${SCHEMA_VERSION}; take a newer one`);
    }
    const kind = told.get("fedeq.kind") ?? "inference";
    if (kind !== "inference") {
      throw new Error(`a ${kind} graph, which does not answer; take what fedeq model export writes`);
    }
    const options = { intraOpNumThreads: 1, interOpNumThreads: 1, logSeverityLevel: 3 };
    return new Model(ort, await ort.InferenceSession.create(bytes, options), told);
  }

  constructor(ort, session, told) {
    const solver = JSON.parse(told.get("fedeq.solver"));
    this.ort = ort;
    this.session = session;
    this.labels = JSON.parse(told.get("fedeq.labels"));
    this.budget = solver.max_iter;
    this.tol = solver.tol;
    this.shape = session.inputMetadata.find((input) => input.name === "x").shape.slice(1);
    this.unrolled = !session.inputNames.includes("max_iter"); // for one budget, without a tolerance
    this.certificate = told.has("fedeq.certificate") ? JSON.parse(told.get("fedeq.certificate")) : null;
  }

  // One answer per sample of x = {data: Float32Array, shape}, one sample or a batch.
  async infer(x, { maxIter = this.budget, tol = this.tol } = {}) {
    const dims = x.shape.length === this.shape.length ? [1, ...x.shape] : x.shape;
    if (String(dims.slice(1)) !== String(this.shape)) {
      throw new Error(`samples have shape (${x.shape.join(", ")}), expected (batch, ${this.shape.join(", ")})`);
    }
    const { Tensor } = this.ort;
    const feeds = { x: new Tensor("float32", x.data, dims) };
    if (this.unrolled) {
      if (maxIter !== this.budget || tol !== this.tol) {
        throw new Error(`unrolled for ${this.budget} iterations; leave out the budget and the tolerance`);
      }
    } else {
      feeds.tol = new Tensor("float32", [tol], []);
      feeds.max_iter = new Tensor("int64", [BigInt(maxIter)], []);
    }
    const found = await this.session.run(feeds);
    return Array.from({ length: dims[0] }, (_, row) => this.#answer(found, row));
  }

  #answer(found, row) {
    const classes = this.labels.length;
    const logits = found.logits.data.slice(row * classes, (row + 1) * classes);
    const known = logits.every(Number.isFinite);
    return {
      label: known ? this.labels[logits.indexOf(Math.max(...logits))] : null,
      iterations: Number(found.iterations.data[row]),
      residual: found.residual.data[row],
      logits,
    };
  }

  // What is proven of |z_K - z*| after so many evaluations, null without a proof. From the file's own K0 and bound:
  // gamma^(K - K0) times that before K0, and no more than that behind.
  bound(evaluations) {
    if (this.certificate === null) return null;
    const { gamma, bound, evaluations: own } = this.certificate;
    return bound * gamma ** Math.min(0, evaluations - own);
  }
}

// The largest difference of the answers' logits from stored ones, and whether that is agreement.
export function compare(answers, stored) {
  const ours = answers.flatMap((answer) => [...answer.logits]);
  if (ours.length !== stored.data.length) throw new Error("the stored logits have another shape");
  const difference = Math.max(...ours.map((value, i) => Math.abs(value - stored.data[i])));
  const largest = Math.max(...stored.data.map(Math.abs));
  return { difference, agrees: difference <= AGREEMENT * largest };
}

// The float32 array in an .npy file as {data, shape}.
export function readNpy(bytes) {
  const ascii = (start, end) => new TextDecoder("ascii").decode(bytes.subarray(start, end));
  if (bytes.length < 12 || bytes[0] !== 0x93 || ascii(1, 6) !== "NUMPY") throw new Error("not an .npy file");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const [start, length] = bytes[6] === 1 ? [10, view.getUint16(8, true)] : [12, view.getUint32(8, true)];
  const header = ascii(start, start + length);
  if (!header.includes("'descr': '<f4'") || !header.includes("'fortran_order': False")) {
    throw new Error("save the .npy as float32 in C order");
  }
  const shape = (header.match(/'shape': \(([^)]*)\)/)?.[1].match(/\d+/g) ?? []).map(Number);
  const count = shape.reduce((product, size) => product * size, 1);
  if (bytes.length !== start + length + 4 * count) throw new Error("the .npy file is cut off");
  return { data: new Float32Array(new Uint8Array(bytes.subarray(start + length)).buffer), shape };
}

// The entries of an ONNX file's metadata, which onnxruntime does not show in JavaScript: field 14 of a ModelProto.
export function metadata(bytes) {
  const text = new TextDecoder();
  const entries = new Map();
  for (const [number, content] of fields(bytes)) {
    if (number !== 14) continue;
    const entry = new Map(fields(content));
    entries.set(text.decode(entry.get(1)), text.decode(entry.get(2)));
  }
  return entries;
}

// [number, content] of the fields of a protobuf message that hold bytes; the others are passed over.
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    for (let value = 0, scale = 1; at < bytes.length; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
    throw new Error("not an ONNX file");
  };
  while (at < bytes.length) {
    const key = varint();
    const kind = key & 7;
    const size = { 0: () => (varint(), 0), 1: () => 8, 2: varint, 5: () => 4 }[kind]?.();
    if (size === undefined || at + size > bytes.length) throw new Error("not an ONNX file");
    if (kind === 2) yield [Math.floor(key / 8), bytes.subarray(at, at + size)];
    at += size;
  }
}
