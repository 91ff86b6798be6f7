// The two charts, by budget: residuals on a logarithmic axis, and the probability of every class.

const LEFT = 64; // room for the labels of the y axis
const RIGHT = 8;
const SPACE = "http://www.w3.org/2000/svg";

// Names and texts go in as attributes and text nodes, never as markup: labels come out of a file.
function add(parent, name, attributes, text) {
  const element = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// An empty chart in pixels of the page, so that its text has the size of the text around it.
function begin(svg, count, height) {
  const right = svg.clientWidth - RIGHT;
  svg.replaceChildren();
  svg.setAttribute("height", height);
  const step = (right - LEFT) / count;
  return { step, right, middle: (K) => LEFT + (K - 0.5) * step };
}

function budgets(svg, middle, count, y) {
  for (let K = 1; K <= count; K++) {
    if (K === 1 || K % 5 === 0) add(svg, "text", { x: middle(K), y, "text-anchor": "middle" }, K === 1 ? "K = 1" : K);
  }
}

// path: residual by K - 1. bounds: proven error by K - 1, or null. tol: where the solver stops. chosen: K.
export function residuals(svg, { path, bounds, tol, chosen }) {
  const [top, bottom, height] = [8, 232, 256];
  const { middle, right } = begin(svg, path.length, height);
  const low = Math.floor(Math.log10(Math.max(1e-9, Math.min(tol, ...path.filter((value) => value > 0)))));
  const y = (value) => top + ((bottom - top) * Math.min(0, Math.log10(value))) / low;
  for (let power = 0; power >= low; power -= Math.ceil(-low / 6)) {
    add(svg, "path", { class: "grid", d: `M${LEFT} ${y(10 ** power)}H${right}` });
    add(svg, "text", { x: LEFT - 8, y: y(10 ** power) + 4, "text-anchor": "end" }, power === 0 ? "1" : `1e${power}`);
  }
  const curve = (values) => values.map((value, i) => `${i ? "L" : "M"}${middle(i + 1)} ${y(value)}`).join("");
  const drawn = path.map((value) => Math.min(1, Math.max(10 ** low, value)));
  add(svg, "path", { class: "line tolerance", d: `M${LEFT} ${y(tol)}H${right}` });
  if (bounds !== null) add(svg, "path", { class: "line proven", d: curve(bounds.map((value) => Math.min(1, value))) });
  add(svg, "path", { class: "line ours", d: curve(drawn) });
  drawn.forEach((value, i) => {
    const mine = i + 1 === chosen;
    add(svg, "circle", { class: mine ? "dot chosen" : "dot", cx: middle(i + 1), cy: y(value), r: mine ? 6 : 2.5 });
  });
  budgets(svg, middle, path.length, height - 4);
  const said = `Residual ${path[0].toExponential(1)} after one evaluation, ${path.at(-1).toExponential(1)} after ${path.length}`;
  svg.setAttribute("aria-label", said);
}

// probabilities: per K - 1, one per label; at most `rows` labels are drawn, those most probable at the last K.
export function classes(svg, { probabilities, labels, chosen, rows = 12 }) {
  const tall = 18;
  const last = probabilities.at(-1);
  const order = labels.map((_, i) => i).sort((a, b) => last[b] - last[a]);
  const kept = order.slice(0, rows).sort((a, b) => a - b);
  const height = tall * kept.length + 28;
  const { step, right, middle } = begin(svg, probabilities.length, height);
  kept.forEach((label, row) => {
    const name = labels[label].length > 8 ? `${labels[label].slice(0, 7)}…` : labels[label];
    add(svg, "text", { x: LEFT - 8, y: row * tall + 13, "text-anchor": "end" }, name);
    const place = { y: row * tall, height: tall - 1 };
    add(svg, "rect", { class: "back", x: LEFT, width: right - LEFT, ...place });
    probabilities.forEach((values, i) => {
      if (values[label] < 0.005) return;
      const x = middle(i + 1) - step / 2 + 0.5;
      add(svg, "rect", { class: "cell", x, width: step - 1, "fill-opacity": values[label].toFixed(3), ...place });
    });
  });
  const frame = { x: middle(chosen) - step / 2, y: -1, width: step, height: tall * kept.length + 1, rx: 2 };
  add(svg, "rect", { class: "chosen", ...frame });
  budgets(svg, middle, probabilities.length, height - 6);
}
