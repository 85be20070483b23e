"use strict";
// One picture is chosen at a time: an uploaded file, or the number of an example. `shown` is the last whose preview came.
const at = (id) => document.getElementById(id);
let about = null, chosen = null, shown = null, running = null;

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("igpt demo does not answer; is it still running?");
  }
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

function post(path, fields, withPicture, signal) {
  const query = new URLSearchParams(fields);
  const isExample = withPicture && typeof chosen === "number";
  if (isExample) query.set("example", chosen);
  return ask(`${path}?${query}`, {method: "POST", signal, body: withPicture && !isExample ? chosen : ""});
}

// The bytes of a file, kept here: the browser refuses to send a file that has changed on disk since it was chosen.
async function bytes(file) {
  try {
    return new Blob([await file.arrayBuffer()]);
  } catch {
    throw new Error("This file cannot be read; choose it again.");
  }
}

async function choose(picture) {
  chosen = picture;
  try {
    if (picture.size > about.max_upload) throw new Error(`This file is larger than ${about.max_upload >> 20} MiB; shrink it first.`);
    if (picture instanceof File) {
      const kept = await bytes(picture);
      if (chosen !== picture) return;  // another one was chosen meanwhile
      chosen = picture = kept;
    }
    const seen = await (await post("picture", {}, true)).blob();
    if (chosen !== picture) return;
    shown = picture;
    URL.revokeObjectURL(at("picture").src);
    at("picture").src = URL.createObjectURL(seen);
    at("picture").hidden = false;
    at("neighbours").replaceChildren();
    say("");
  } catch (error) {
    if (chosen !== picture) return;
    chosen = shown;
    say(error.message, true);
  }
  document.querySelectorAll("#examples button").forEach((button, i) => button.setAttribute("aria-pressed", i === chosen));
  refresh();
}

// The rows of tokens that the model is given: as kept_rows in igpt/sample.py, which rounds halves to even.
function keptRows() {
  const rows = at("keep").value * about.rows, up = Math.round(rows);
  return Math.min(rows % 1 === 0.5 && up % 2 ? up - 1 : up, about.rows - 1);
}

function refresh() {
  for (const output of document.querySelectorAll("output")) output.textContent = at(output.htmlFor.toString()).value;
  at("hidden").style.height = `${100 * (1 - keptRows() / about.rows)}%`;
  at("hidden").hidden = chosen === null;
  at("complete").disabled = running !== null || chosen === null || !about.can_complete;
  at("sample").disabled = running !== null || !about.can_sample;
  at("nearest").disabled = running !== null || chosen === null || !about.train_images;
  at("stop").hidden = running === null;
}

function settings() {
  return Object.fromEntries(["keep", "temperature", "top_k", "num", "seed"].map((id) => [id, at(id).value]));
}

// Shows one computation at a time. `work` gets a signal that the button Stop raises.
async function run(what, work) {
  running = new AbortController();
  refresh();
  say(`${what} ...`);
  try {
    say(await work(running.signal));
  } catch (error) {
    say(error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  }
  running = null;
  refresh();
}

function figures(place, pictures) {
  while (place.children.length > pictures.length) place.lastChild.remove();
  pictures.forEach(({image, text}, i) => {
    let figure = place.children[i];
    if (!figure) {
      figure = document.createElement("figure");
      figure.append(document.createElement("img"), document.createElement("figcaption"));
      place.append(figure);
    }
    figure.firstChild.src = image;
    figure.firstChild.alt = text || `picture ${i + 1}`;
    figure.lastChild.textContent = text || "";
  });
}

async function draw(path, withPicture, given) {
  await run("drawing", async (signal) => {
    const started = performance.now();
    const answer = await post(path, settings(), withPicture, signal);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", row = given;
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        figures(at("drawn"), JSON.parse(line).map((image) => ({image})));
        row += 1;
        say(`row ${row} of ${about.rows}`);
      }
    }
    if (row < about.rows) throw new Error("the drawing ended early; the terminal of igpt demo says more");
    return `drawn in ${((performance.now() - started) / 1000).toFixed(1)} s`;
  });
}

async function start() {
  about = await (await ask("about")).json();
  at("about").textContent = about.text;
  at("noun").textContent = about.noun;
  at("top_k").max = about.vocab_size;
  for (let i = 0; i < about.examples; i++) {
    const button = document.createElement("button"), image = document.createElement("img");
    image.src = `examples/${i}.png`;
    image.alt = `example ${i + 1}`;
    button.append(image);
    button.addEventListener("click", () => choose(i));
    at("examples").append(button);
  }
  for (const {layer, accuracy} of about.layers) {
    const text = accuracy === null ? `${layer}` : `${layer}: ${(100 * accuracy).toFixed(1)} %`;
    at("layer").append(new Option(text, layer, false, layer === about.best_layer));
  }
  at("layers").hidden = !about.train_images && !about.has_probe_picture;
  if (about.has_probe_picture) {
    at("probe").src = "probe.png";
    at("probe").hidden = false;
  }
  if (about.probe_step !== null) {
    at("probed").textContent = `The accuracies are of the probe of step ${about.probe_step}.`;
    at("probed").hidden = false;
  }
  if (!about.causal) say("This model was trained with the BERT objective: it predicts masked pixels and cannot sample.");
  else if (!about.can_complete) say("This model has no head that draws pixels: it gives features only.");
  else if (!about.examples) say(`No pictures of the run are here: ${about.why_no_data}`);
  at("file").addEventListener("change", () => {
    if (!at("file").files.length) return;
    choose(at("file").files[0]);
    at("file").value = "";  // so that the same file can be chosen again
  });
  const drop = at("drop");
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
    });
  }
  for (const id of ["keep", "temperature"]) at(id).addEventListener("input", refresh);
  at("complete").addEventListener("click", () => draw("complete", true, keptRows()));
  at("sample").addEventListener("click", () => draw("sample", false, 0));
  at("stop").addEventListener("click", () => running && running.abort());
  at("nearest").addEventListener("click", () => run("reading features", async (signal) => {
    const asked = chosen;
    const found = await (await post("nearest", {layer: at("layer").value}, true, signal)).json();
    if (asked !== chosen) return "";  // another picture is chosen now
    figures(at("neighbours"), found.map((one) => ({image: one.image, text: `${one.class} ${one.cosine.toFixed(3)}`})));
    return `the nearest of ${about.train_images} training images, by layer ${at("layer").value}`;
  }));
  refresh();
  if (about.examples) await choose(0);
}

start().catch((error) => say(error.message, true));
