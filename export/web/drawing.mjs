// From ink on a canvas to a sample of the model's shape, and back to pixels that can be looked at.

const PEN = 1 / 9; // of the pad's side: the strokes of the digits that the model has learnt
// Large images of digits (MNIST) keep a margin, 20 of 28; the 8x8 ones fill theirs, but for the sides.
const LARGE = 16;
const MARGIN = 20 / 28;
const SMALL_WIDTH = 26 / 32;
const DETAIL = 4; // pixels of the drawing, per side, that one of the sample is the mean of

// Call `changed` whenever the drawing on the canvas has.
export function listen(pad, changed) {
  const pen = pad.getContext("2d", { willReadFrequently: true });
  let last = null;
  const at = (event) => {
    const box = pad.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * pad.width, ((event.clientY - box.top) / box.height) * pad.height];
  };
  const stroke = (event) => {
    const here = at(event);
    pen.strokeStyle = getComputedStyle(pad).color;
    pen.lineWidth = pad.width * PEN;
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(...(last ?? here));
    pen.lineTo(...here);
    pen.stroke();
    delete pad.parentElement.dataset.empty;
    last = here;
    changed();
  };
  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    last = null;
    stroke(event);
  });
  pad.addEventListener("pointermove", (event) => {
    if (pad.hasPointerCapture(event.pointerId)) stroke(event);
  });
}

export function clear(pad) {
  pad.parentElement.dataset.empty = "";
  pad.getContext("2d").clearRect(0, 0, pad.width, pad.height);
}

// The image on the pad as ink: dark on light is taken for paper, light on dark for a scan of the inverse.
export async function putImage(pad, file) {
  const image = await createImageBitmap(file);
  clear(pad);
  delete pad.parentElement.dataset.empty;
  const pen = pad.getContext("2d");
  const scale = Math.min(pad.width / image.width, pad.height / image.height);
  const [width, height] = [image.width * scale, image.height * scale];
  pen.drawImage(image, (pad.width - width) / 2, (pad.height - height) / 2, width, height);
  const pixels = pen.getImageData(0, 0, pad.width, pad.height);
  const light = pixels.data.map((_, i) => (i % 4 ? 0 : brightness(pixels.data, i)));
  const drawn = light.filter((_, i) => i % 4 === 0 && pixels.data[i + 3] > 0);
  const paper = drawn.reduce((sum, value) => sum + value, 0) / drawn.length > 127;
  const ink = getComputedStyle(pad).color.match(/\d+/g).map(Number);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data[i + 3] = (pixels.data[i + 3] / 255) * (paper ? 255 - light[i] : light[i]);
    pixels.data.set(ink.slice(0, 3), i);
  }
  pen.putImageData(pixels, 0, 0);
}

function brightness(data, i) {
  return 0.3 * data[i] + 0.59 * data[i + 1] + 0.11 * data[i + 2];
}

// The drawing as a sample {data, shape} of shape (1, height, width) in [0, 1], centred and scaled as the digits of the
// training data are; null for an empty pad.
export function sampleOf(pad, shape) {
  const [, height, width] = shape;
  const box = inked(pad);
  if (box === null) return null;
  const tall = height >= LARGE ? MARGIN * height : height;
  const wide = height >= LARGE ? MARGIN * width : SMALL_WIDTH * width;
  const scale = Math.min((tall * DETAIL) / box.height, (wide * DETAIL) / box.width);
  const [w, h] = [box.width * scale, box.height * scale];
  const fine = document.createElement("canvas");
  [fine.width, fine.height] = [width * DETAIL, height * DETAIL];
  const pen = fine.getContext("2d", { willReadFrequently: true });
  pen.imageSmoothingQuality = "high";
  pen.drawImage(pad, box.x, box.y, box.width, box.height, (fine.width - w) / 2, (fine.height - h) / 2, w, h);
  return { data: means(pen.getImageData(0, 0, fine.width, fine.height), height, width), shape };
}

// The least box around everything drawn.
function inked(pad) {
  const { data } = pad.getContext("2d").getImageData(0, 0, pad.width, pad.height);
  let [left, top, right, bottom] = [pad.width, pad.height, -1, -1];
  for (let y = 0; y < pad.height; y++) {
    for (let x = 0; x < pad.width; x++) {
      if (data[4 * (y * pad.width + x) + 3] < 64) continue;
      [left, right] = [Math.min(left, x), Math.max(right, x)];
      [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
    }
  }
  return right < 0 ? null : { x: left, y: top, width: right - left + 1, height: bottom - top + 1 };
}

function means(fine, height, width) {
  const sample = new Float32Array(height * width);
  for (let y = 0; y < fine.height; y++) {
    for (let x = 0; x < fine.width; x++) {
      const cell = Math.floor(y / DETAIL) * width + Math.floor(x / DETAIL);
      sample[cell] += fine.data[4 * (y * fine.width + x) + 3] / 255 / DETAIL ** 2;
    }
  }
  return sample;
}

// The sample as grey pixels: an image as it is, several channels one above the other, anything else as rows.
export function show(canvas, { data, shape }) {
  const width = shape.at(-1);
  const height = data.length / width;
  const [low, high] = [data.reduce((a, b) => Math.min(a, b), 0), data.reduce((a, b) => Math.max(a, b), 1)];
  [canvas.width, canvas.height] = [width, height];
  const pixels = new ImageData(width, height);
  data.forEach((value, i) => {
    const shade = 255 * (1 - (value - low) / (high - low));
    pixels.data.set([shade, shade, shade, 255], 4 * i);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}
