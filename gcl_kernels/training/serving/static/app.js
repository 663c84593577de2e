"use strict";
// Text from the corpus goes into the page by textContent and setAttribute alone.

const byId = (id) => document.getElementById(id);
const COUNT = 10;
const TYPING = 250, SLIDING = 100; // ms without a change before a search
const MOST_BYTES = 10_000_000;
const state = { about: null, picture: null, touched: false, asked: null, answers: [], timer: 0 };

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function fault(text) {
  byId("fault").textContent = text;
  byId("fault").hidden = !text;
}

async function json(url, options) {
  const response = await fetch(url, options);
  const content = await response.json().catch(() => ({}));
  if (response.ok) return content;
  const detail = content.detail;
  throw new Error(typeof detail === "string" ? detail : detail ? detail.map((of) => of.msg).join("; ") : `status ${response.status}`);
}

// ---- what is asked

function slider(name, value, most) {
  const line = make("label", "slider");
  const range = Object.assign(make("input"), { type: "range", min: 0, max: most, step: most / 20, value });
  range.dataset.field = name;
  range.dataset.trained = range.value;
  const number = make("output", "", Number(range.value).toFixed(2));
  line.append(make("span", "", name), range, number);
  range.addEventListener("input", () => {
    number.textContent = Number(range.value).toFixed(2);
    state.touched = true;
    later(SLIDING);
  });
  return line;
}

function parametersOf(model) {
  const parameters = new URLSearchParams({ q: byId("query").value.trim(), model: model.key, k: COUNT });
  if (state.touched) {
    for (const range of byId("weights").querySelectorAll("input")) {
      if (range.dataset.field in model.fields) parameters.append("weights", `${range.dataset.field}=${range.value}`);
    }
  }
  for (const select of byId("filters").querySelectorAll("select")) {
    if (select.value) parameters.append("where", `${select.dataset.column}=${select.value}`);
  }
  if (state.picture && byId("query").value.trim()) {
    const balance = Number(byId("balance").value);
    parameters.append("query_weights", `text=${(1 - balance).toFixed(2)}`);
    parameters.append("query_weights", `image=${balance.toFixed(2)}`);
  }
  return parameters;
}

function later(milliseconds) {
  clearTimeout(state.timer);
  state.timer = setTimeout(search, milliseconds);
}

async function search() {
  clearTimeout(state.timer);
  const text = byId("query").value.trim();
  byId("balance-line").hidden = !(text && state.picture);
  state.asked?.abort();
  history.replaceState(null, "", text ? `?${new URLSearchParams({ q: text })}` : location.pathname);
  const nothing = !text && !state.picture;
  byId("examples").hidden = !nothing || !state.about.queries.length;
  if (nothing) {
    state.answers = [];
    byId("status").textContent = "";
    fault("");
    return show();
  }
  const asked = (state.asked = new AbortController());
  const started = performance.now();
  try {
    const options = { signal: asked.signal, ...(state.picture ? { method: "POST", body: state.picture } : {}) };
    const answers = await Promise.all(
      state.about.models.map(async (model) => {
        const answer = await json(`/api/search?${parametersOf(model)}`, options);
        return { ...answer, waited: performance.now() - started };
      }),
    );
    if (asked.signal.aborted) return;
    state.answers = answers;
    fault("");
    show();
    const found = Math.max(...answers.map((answer) => answer.results.length));
    byId("status").textContent = found
      ? `${found} documents in ${Math.round(performance.now() - started)} ms${answers[0].judged ? ", with grades" : ""}`
      : "No document found";
  } catch (error) {
    if (asked.signal.aborted) return;
    state.answers = [];
    show();
    byId("status").textContent = "";
    fault(error.message);
  }
}

function setPicture(file) {
  if (file && !file.type.startsWith("image/")) return fault("Expected a picture.");
  if (file && file.size > MOST_BYTES) return fault("Expected a picture of at most 10 MB.");
  URL.revokeObjectURL(byId("preview").src);
  state.picture = file || null;
  byId("chosen").hidden = !file;
  if (file) byId("preview").src = URL.createObjectURL(file);
  else byId("preview").removeAttribute("src");
  byId("file").value = "";
  search();
}

// ---- what is found

function moved(result, other) {
  const before = other.results.find((of) => of.id === result.id)?.rank;
  if (!before) return ["new", "new", `not among the first ${other.results.length} of the other model`];
  const by = before - result.rank;
  if (by === 0) return ["still", "=", "the same rank as with the other model"];
  return by > 0 ? ["up", `▲ ${by}`, `${by} ranks higher`] : ["down", `▼ ${-by}`, `${-by} ranks lower`];
}

function mark(className, text, words) {
  const made = make("span", className);
  const shown = make("span", "", text);
  shown.setAttribute("aria-hidden", "true");
  made.append(shown, make("span", "hidden", words));
  made.title = words;
  return made;
}

function card(result, answer, place) {
  const made = make("button", "card");
  made.type = "button";
  made.dataset.id = result.id;
  made.tabIndex = place === 0 && result.rank === 1 ? 0 : -1;
  let picture = make("span", "picture none");
  if (result.image) {
    picture = Object.assign(make("img", "picture"), { src: result.image, alt: "", loading: "lazy" });
    picture.addEventListener("error", () => picture.replaceWith(make("span", "picture none")));
  }
  const words = make("span", "words");
  words.append(make("span", "title", result.title));
  const more = Object.entries(result.columns).map(([name, value]) => `${name}: ${value}`).join(" · ");
  if (more) words.append(make("div", "more", more));
  const marks = make("span", "marks");
  marks.append(mark("score", result.score.toFixed(3), `score ${result.score.toFixed(3)}`));
  if (place > 0) marks.append(mark(...moved(result, state.answers[0])));
  if (result.grade !== null) {
    const level = [80, 60, 30, 1].findIndex((least) => result.grade >= least);
    const words = result.grade ? `grade ${result.grade}` : "not judged: counts as 0";
    marks.append(mark(`grade g${level < 0 ? 0 : 4 - level}`, result.grade ? `grade ${result.grade}` : "grade –", words));
  }
  made.append(make("span", "rank", String(result.rank)), picture, words, marks);
  made.addEventListener("click", () => details(result));
  const same = (on) => {
    for (const of of document.querySelectorAll(".card")) of.classList.toggle("same", on && of !== made && of.dataset.id === result.id);
  };
  made.addEventListener("mouseenter", () => same(true));
  made.addEventListener("mouseleave", () => same(false));
  made.addEventListener("focus", () => same(true));
  made.addEventListener("blur", () => same(false));
  return made;
}

function show() {
  const sections = state.answers.map((answer, place) => {
    const model = state.about.models.find((of) => of.key === answer.model);
    const section = make("section");
    const heading = make("h2", "", model.name);
    heading.id = `model-${answer.model}`;
    section.setAttribute("aria-labelledby", heading.id);
    const { embed, search } = answer.milliseconds;
    const took = make("p", "quiet took", `${embed.toFixed(1)} ms to embed, ${search.toFixed(1)} ms to search${model.exact ? "" : " by an index"}`);
    const list = make("ol");
    for (const result of answer.results) {
      const line = make("li");
      line.append(card(result, answer, place));
      list.append(line);
    }
    section.append(heading, took, list);
    return section;
  });
  byId("models").className = sections.length > 1 ? "two" : "";
  byId("models").replaceChildren(...sections);
}

function details(result) {
  byId("details-title").textContent = result.title;
  byId("details-image").hidden = !result.image;
  if (result.image) byId("details-image").src = result.image;
  else byId("details-image").removeAttribute("src");
  const lines = [["id", result.id]];
  for (const answer of state.answers) {
    const model = state.about.models.find((of) => of.key === answer.model);
    const found = answer.results.find((of) => of.id === result.id);
    lines.push([model.name, found ? `rank ${found.rank}, score ${found.score.toFixed(4)}` : `not among the first ${COUNT}`]);
  }
  if (result.grade !== null) lines.push(["grade", result.grade ? String(result.grade) : "not judged: counts as 0"]);
  lines.push(...Object.entries(result.columns));
  byId("details-values").replaceChildren(...lines.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
  byId("details").showModal();
}

// ---- keys

function move(event) {
  const columns = [...document.querySelectorAll("#models section")].map((of) => [...of.querySelectorAll(".card")]);
  const column = columns.findIndex((of) => of.includes(document.activeElement));
  const step = { ArrowDown: [0, 1], ArrowUp: [0, -1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
  if (!step) return;
  if (column < 0) {
    if (event.key === "ArrowDown" && event.target === byId("query") && columns[0]?.length) {
      event.preventDefault();
      columns[0][0].focus();
    }
    return;
  }
  event.preventDefault();
  const row = columns[column].indexOf(document.activeElement) + step[1];
  if (row < 0) return byId("query").focus();
  const next = columns[Math.min(Math.max(column + step[0], 0), columns.length - 1)];
  next[Math.min(row, next.length - 1)]?.focus();
}

document.addEventListener("keydown", (event) => {
  if (byId("details").open || event.ctrlKey || event.metaKey || event.altKey) return;
  const writing = event.target.matches("input, select, textarea");
  if (event.key === "/" && !(writing && event.target.type !== "range")) {
    event.preventDefault();
    byId("query").focus();
    byId("query").select();
  } else if (!writing || event.target === byId("query")) move(event);
});

// ---- the page

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
byId("query").addEventListener("input", () => later(TYPING));
byId("file").addEventListener("change", () => byId("file").files[0] && setPicture(byId("file").files[0]));
byId("clear").addEventListener("click", () => {
  setPicture(null);
  byId("query").focus();
});
byId("balance").addEventListener("input", () => {
  byId("balance").nextElementSibling.textContent = Number(byId("balance").value).toFixed(2);
  later(SLIDING);
});
byId("trained").addEventListener("click", () => {
  state.touched = false;
  for (const range of byId("weights").querySelectorAll("input")) {
    range.value = range.dataset.trained;
    range.nextElementSibling.textContent = Number(range.value).toFixed(2);
  }
  search();
});
let depth = 0; // dragenter and dragleave come for every element under the pointer
const dragged = (change) => {
  depth = Math.max(depth + change, 0);
  byId("drop").hidden = depth === 0;
};
document.addEventListener("dragenter", () => dragged(1));
document.addEventListener("dragleave", () => dragged(-1));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  dragged(-depth);
  if (event.dataTransfer.files[0]) setPicture(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files[0]) setPicture(event.clipboardData.files[0]);
});

async function start() {
  try {
    state.about = await json("/api/corpus");
  } catch (error) {
    return fault(error.message);
  }
  const { name, size, models, columns, queries } = state.about;
  document.title = `${name} – search`;
  byId("about").textContent = `${name}: ${size.toLocaleString("en")} documents; ${models.map((model) => model.name).join(" against ")}`;
  const fields = Object.assign({}, ...models.toReversed().map((model) => model.fields));
  const most = Math.max(1, ...Object.values(fields));
  for (const [field, value] of Object.entries(fields)) byId("weights").append(slider(field, value, most));
  for (const [column, values] of Object.entries(columns)) {
    if (!values.length) continue;
    const line = make("label", "filter");
    const select = make("select");
    select.dataset.column = column;
    select.append(Object.assign(make("option", "", "any"), { value: "" }));
    for (const value of values) select.append(Object.assign(make("option", "", value), { value }));
    select.addEventListener("change", search);
    line.append(make("span", "", column), select);
    byId("filters").append(line);
    byId("filters").hidden = false;
  }
  for (const query of queries) {
    const example = make("button", "button", query);
    example.type = "button";
    example.addEventListener("click", () => {
      byId("query").value = query;
      search();
    });
    byId("examples").append(example);
  }
  byId("query").value = new URLSearchParams(location.search).get("q") ?? "";
  search();
}
start();
