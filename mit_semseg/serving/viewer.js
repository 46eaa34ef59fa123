// Shows props.value: {image, labels} as data urls, {classes: [{id, name, color, area}]}.
// The red and green bytes of a pixel of `labels` are the low and the high byte of class id + 1;
// 0 is no class.
const find = (name) => element.querySelector(name);

function load(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = url;
  });
}

function pixels(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

function row(one, paint) {
  const item = document.createElement("label");
  item.className = "class";
  item.dataset.id = one.id;
  const box = document.createElement("input");
  box.type = "checkbox";
  box.checked = true;
  box.addEventListener("change", paint);
  const swatch = document.createElement("span");
  swatch.className = "swatch";
  swatch.style.background = `rgb(${one.color.join(",")})`;
  const name = document.createElement("span");
  name.className = "name";
  name.textContent = one.name;
  const area = document.createElement("span");
  area.className = "area";
  area.textContent = one.area;
  item.append(box, swatch, name, area);
  return item;
}

let latest = 0; // images load in any order; the last that was asked for counts

async function show() {
  const turn = ++latest;
  const value = props.value;
  find(".viewer").classList.toggle("empty", !value);
  if (!value) return;
  const [image, labels] = await Promise.all([load(value.image), load(value.labels)]);
  if (turn !== latest) return;
  const { width, height, data } = pixels(labels);
  const ids = new Int32Array(width * height);
  for (let i = 0; i < ids.length; i++) ids[i] = data[4 * i] + 256 * data[4 * i + 1] - 1;

  const stage = find(".stage"), canvas = find("canvas"), tip = find(".tip"), list = find(".classes");
  const classes = new Map(value.classes.map((one) => [one.id, one]));
  find(".picture").src = image.src;
  canvas.width = width;
  canvas.height = height;

  function paint() {
    const on = new Set([...list.querySelectorAll("input:checked")]
      .map((box) => Number(box.parentElement.dataset.id)));
    const layer = new ImageData(width, height);
    const words = new Uint32Array(layer.data.buffer);
    const packed = new Map();
    for (const id of on) {
      const bytes = new Uint8Array([...classes.get(id).color, 255]);
      packed.set(id, new Uint32Array(bytes.buffer)[0]);
    }
    for (let i = 0; i < ids.length; i++) words[i] = packed.get(ids[i]) ?? 0;
    canvas.getContext("2d").putImageData(layer, 0, 0);
  }

  function fade() {
    canvas.style.opacity = find("[type=range]").value / 100;
  }

  function mark(id) {
    for (const item of list.children) item.classList.toggle("under", Number(item.dataset.id) === id);
  }

  list.replaceChildren(...value.classes.map((one) => row(one, paint)));
  find("[type=range]").oninput = fade;
  find(".all").onclick = () => toggle(true);
  find(".none").onclick = () => toggle(false);
  function toggle(checked) {
    for (const box of list.querySelectorAll("input")) box.checked = checked;
    paint();
  }
  stage.onpointermove = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / box.width * width);
    const y = Math.floor((event.clientY - box.top) / box.height * height);
    const one = x >= 0 && y >= 0 && x < width && y < height && classes.get(ids[y * width + x]);
    tip.hidden = !one;
    mark(one ? one.id : -1);
    if (!one) return;
    tip.textContent = `${one.name}, ${one.area}`;
    const left = event.clientX - box.left, top = event.clientY - box.top;
    tip.style.left = `${Math.min(left + 12, box.width - tip.offsetWidth)}px`;
    tip.style.top = `${top > 40 ? top - 34 : top + 18}px`;
  };
  stage.onpointerleave = () => {
    tip.hidden = true;
    mark(-1);
  };
  paint();
  fade();
}

watch("value", show);
show();
