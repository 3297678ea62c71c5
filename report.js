// The script of report.py's page. Its data are JSON blocks in the page: one about the run (#page), one a trajectory
// (#tau-0, #tau-1, ...), parsed only when it is looked at. No library, no request.
// Text enters the page as text nodes and attributes alone; nothing is ever parsed as HTML.
"use strict";
const $ = id => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter(child => child != null && child !== false));  // strings become text nodes
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const say = value => value == null ? "" : typeof value === "string" ? value : JSON.stringify(value);
const signed = value => typeof value !== "number" ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const sign = value => value < 0 ? "minus" : "plus";
const mean = values => values.length ? values.reduce((a, b) => a + b) / values.length : null;
const duration = seconds => seconds >= 5400 ? `${number(seconds / 3600)} h`
  : seconds >= 90 ? `${Math.round(seconds / 60)} min` : `${number(seconds)} s`;

function number(value) {  // three significant digits
  if (typeof value !== "number") return say(value) || "–";
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(1).replace("e+", "e").replace(/-/g, "−");
  return String(size >= 100 ? Math.round(value) : Number(value.toPrecision(3))).replace("-", "−");
}

// ---- summary -------------------------------------------------------------------------------------------------------
const hundredths = value => number(Math.round(100 * value) / 100);
const TILES = [  // label, keys of summary.json, how to show them
  ["Reward, first and last 10 steps", ["reward_first10", "reward_last10"], hundredths],
  ["Feasible (R_div = 1), last 10 steps", ["feasible_rate_last10"], hundredths],
  ["Held-out accuracy, before and after", ["accuracy_warmstart", "accuracy_trained"], hundredths],
  ["Accuracy of the best fixed workflow", ["accuracy_best_fixed"], hundredths],
  ["Best reachable accuracy", ["accuracy_best_reachable"], hundredths],
  ["Steps", ["steps"], number], ["Trajectories", ["trajectories"], number],
  ["Policy tokens per second", ["tokens_per_second"], number],
  ["Wall time", ["wall_seconds"], duration], ["Seed", ["seed"], number],
];

function showSummary(page) {
  document.title = `${page.name} · FlowSteer run`;
  $("title").append(page.name);
  const nested = Object.values(page.args).filter(value => value && typeof value === "object" && !Array.isArray(value));
  const args = Object.assign({}, ...nested, page.args);
  const about = ["preset", "model", "executor_model", "group_by", "commit"]
    .filter(key => args[key]).map(key => `${key} ${say(args[key]).slice(0, 60)}`);
  if ("executor_url" in args && !(args.executor_url || "").length)
    about.push("simulated executor: answers come from a skill model, not from an LLM");
  $("about").append(about.join(" · "));
  $("notes").append(...page.notes.map(note => h("div", {class: "note"}, note)));
  for (const [label, keys, show] of TILES) {
    const values = keys.map(key => page.summary[key]).filter(value => value != null);
    if (values.length)
      $("tiles").append(h("div", {class: "tile"}, h("b", {}, values.map(show).join(" → ")), h("span", {}, label)));
  }
  const from = page.from_summary ? "summary.json" : "computed from metrics.jsonl";
  for (const [title, facts] of [[from, page.summary], ["args.json", page.args]]) {
    const rows = Object.entries(facts).map(([key, value]) =>
      h("tr", {}, h("td", {class: "soft"}, key), h("td", {}, say(value))));
    if (rows.length) $("facts").append(h("div", {class: "card"}, h("h3", {}, title), h("table", {}, rows)));
  }
}

// ---- learning curves: every panel shares one cursor, and its legend reads the values there --------------------------
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const BOX = {width: 340, height: 172, left: 42, right: 8, top: 8, bottom: 20};  // SVG units; the page scales it

function smooth(values, window) {  // centred mean as in report.py; running sums keep a long run quick
  const half = window >> 1, sums = [0], counts = [0];
  values.forEach((value, i) => { sums.push(sums[i] + (value ?? 0)); counts.push(counts[i] + (value != null)); });
  return values.map((value, i) => {
    const from = Math.max(0, i - half), to = Math.min(values.length, i + half + 1);
    return value == null ? null : (sums[to] - sums[from]) / (counts[to] - counts[from]);
  });
}

function ticks(low, high) {  // round numbers, three to five of them
  const rough = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(rough));
  const gap = [1, 2, 2.5, 5, 10].map(k => k * unit).find(k => k >= rough), first = Math.ceil(low / gap - 1e-9);
  return Array.from({length: Math.floor(high / gap + 1e-9) - first + 1}, (_, i) => (first + i) * gap);
}

function curveScale(steps, series, limits) {
  const known = series.flat().filter(value => value != null);
  const [low, high] = limits || [known.reduce((a, b) => Math.min(a, b)), known.reduce((a, b) => Math.max(a, b))];
  const pad = ((high - low) || Math.abs(high) || 1) * 0.06, from = low - pad, to = high + pad;
  const first = steps[0], span = steps[steps.length - 1] - first || 1, inner = BOX.width - BOX.left - BOX.right;
  return {
    from, to, first, last: steps[steps.length - 1],
    x: i => BOX.left + inner * (steps[i] - first) / span,
    y: value => BOX.height - BOX.bottom - (BOX.height - BOX.top - BOX.bottom) * (value - from) / (to - from),
    nearest(x) {  // index of the step under an SVG x
      const at = first + span * (x - BOX.left) / inner;
      return steps.reduce((best, step, i) => Math.abs(step - at) < Math.abs(steps[best] - at) ? i : best, 0);
    },
  };
}

function makePanel(spec, table, onPoint) {  // -> {element, draw(window), mark(index of the step)}
  const series = spec.columns.map(name => table[name]), scale = curveScale(table.step, series, spec.limits);
  const lines = s("g"), marks = s("g"), reads = spec.columns.map(() => h("b"));
  const style = k => `stroke: var(--c${k % 7})`;
  const path = values => {
    let pen = "M";  // lifted over gaps
    return values.map((value, i) => {
      const point = value == null ? "" : `${pen}${scale.x(i).toFixed(1)} ${scale.y(value).toFixed(1)}`;
      pen = value == null ? "M" : "L";
      return point;
    }).join("");
  };
  const floor = BOX.height - 4, right = BOX.width - BOX.right;
  const svg = s("svg",
    {viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", "aria-label": `${spec.title} over steps`},
    ticks(scale.from, scale.to).map(value => [
      s("line", {class: "grid", x1: BOX.left, x2: right, y1: scale.y(value), y2: scale.y(value)}),
      s("text", {x: BOX.left - 6, y: scale.y(value) + 4, "text-anchor": "end"}, number(value))]),
    s("text", {x: BOX.left, y: floor}, number(scale.first)),
    s("text", {x: right, y: floor, "text-anchor": "end"}, `step ${number(scale.last)}`), lines, marks);
  const follow = event => {
    const area = svg.getBoundingClientRect();
    onPoint(scale.nearest((event.clientX - area.left) / area.width * BOX.width));
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  const key = k => s("svg", {viewBox: "0 0 22 8"},
    s("line", {x1: 0, x2: 22, y1: 4, y2: 4, "stroke-width": 2.5, style: style(k), "stroke-dasharray": DASHES[k % 4]}));
  const legend = spec.columns.map((name, k) => h("span", {}, key(k), name.split("/").pop() + " ", reads[k]));
  return {
    element: h("div", {class: "card panel"}, h("h3", {}, spec.title), h("div", {class: "meaning"}, spec.meaning),
      h("div", {class: "legend"}, legend), svg),
    draw(window) {
      const raw = window > 1 && series.length < 3 ? series : [];  // behind more curves it would be a tangle
      lines.replaceChildren(
        ...raw.map((values, k) => s("path", {class: "curve raw", style: style(k), d: path(values)})),
        ...series.map((values, k) => s("path",
          {class: "curve", style: style(k), "stroke-dasharray": DASHES[k % 4], d: path(smooth(values, window))})));
    },
    mark(i) {
      const x = scale.x(i), known = series.map((values, k) => [values[i], k]).filter(([value]) => value != null);
      marks.replaceChildren(s("line", {class: "cross", x1: x, x2: x, y1: BOX.top, y2: BOX.height - BOX.bottom}),
        ...known.map(([value, k]) => s("circle", {cx: x, cy: scale.y(value), r: 3, style: `fill: var(--c${k % 7})`})));
      series.forEach((values, k) => { reads[k].textContent = number(values[i]); });
    },
  };
}

function showCurves(page) {
  const steps = page.table.step;
  const moveTo = i => {
    $("cursor").value = i;
    $("cursor-value").value = number(steps[i]);
    panels.forEach(panel => panel.mark(i));
  };
  const redraw = () => {
    const window = Number($("window").value);
    $("window-value").value = window > 1 ? `${window} steps` : "off";
    panels.forEach(panel => panel.draw(window));
  };
  const panels = page.panels.map(spec => {
    const panel = makePanel(spec, page.table, moveTo);
    ($(spec.group) || $("machine")).append(panel.element);
    return panel;
  });
  $("machine").parentNode.hidden = !$("machine").children.length;
  $("window").value = Math.min(51, 2 * Math.floor(steps.length / 20) + 1);
  $("window").addEventListener("input", redraw);
  $("cursor").max = steps.length - 1;
  $("cursor").addEventListener("input", () => moveTo(Number($("cursor").value)));
  redraw();
  moveTo(steps.length - 1);
}

// ---- the commonest workflows of each kind ---------------------------------------------------------------------------
function showDesigns(page) {
  const unbroken = text => text.split(/(->)/).map(part => part === "->" ? h("span", {}, part) : part);
  const design = ({workflow, n, reward}, all) => h("div", {class: "design"},
    h("div", {class: "meaning"},
      `${Math.round(100 * n / all)} % · mean reward `, h("span", {class: sign(reward)}, signed(reward))),
    h("div", {class: "share"}, h("i", {style: `width: ${100 * n / all}%`})),
    drawWorkflow(workflow, {}, true), h("code", {}, unbroken(workflow)));
  for (const [kind, thirds] of Object.entries(page.workflows))
    $("kinds").append(h("h3", {}, kind), h("div", {class: "thirds"}, thirds.map(third => h("div", {class: "card"},
      h("div", {class: "meaning"}, `steps ${[...new Set(third.steps)].join("–")}: ${third.distinct} different in ${third.n}`),
      third.top.map(entry => design(entry, third.n))))));
  if (!page.trajectories.length) $("kinds").append(h("p", {}, "No trajectory is recorded yet."));
}

// ---- the trajectory browser. Its state lives in the address: #step=40&tau=3&turn=2 --------------------------------
const splitEdit = text => {  // [reasoning, edit]: the edit starts at the first <action> behind a <think> block
  const after = Math.max(0, text.lastIndexOf("</think>")), at = text.slice(after).search(/<action>/i);
  return at < 0 ? ["", text] : [text.slice(0, after + at).trim(), text.slice(after + at)];
};
const nodeNames = text => new Map(
  (parseWorkflow(text) || []).flatMap(stage => stage.nodes).map(node => [node.id, node.name]));
const workflowOf = turn => {  // with node ids where the feedback names them and they are missing in the record
  const said = /^Workflow: (.*)$/m.exec(say(turn.feedback)), text = say(turn.workflow);
  return said && said[1].replace(/\bn\d+(\.\d+)*:/g, "") === text ? said[1] : text;
};

function tauHead(tau) {
  const parts = tau.parts || {}, chip = (name, value) => typeof value === "number" &&
    h("span", {class: `chip ${value ? "" : "zero"}`}, `${name} ${value ? signed(value) : "0"}`);
  const lost = [tau.dropped && `dropped: ${say(tau.dropped)}`, tau.error].filter(Boolean).map(say).join(", ");
  const facts = [tau.source, tau.kind, tau.stop_reason, tau.version != null && `adapter ${say(tau.version)}`,
    tau.n_tokens && `${number(tau.n_policy_tokens)} of ${number(tau.n_tokens)} tokens sampled`];
  return [
    h("div", {}, h("h3", {}, `Step ${say(tau.step)}, trajectory ${tau.tau}: ${say(tau.task_id)}`),
      h("div", {class: "soft"}, facts.filter(Boolean).join(" · ")), lost && h("div", {class: "note"}, lost)),
    h("div", {class: "chips"}, h("span", {class: `reward ${sign(tau.reward)}`}, `reward ${signed(tau.reward)}`),
      ["base", "checker", "format", "operators", "structure", "answer"].map(name => chip(name, parts[name])),
      chip("advantage", tau.advantage)),
  ];
}

function tauTurn(tau, turn, goTo) {  // turn: 1-based
  const turns = tau.turns || [], it = turns[turn - 1] || {edit: "no turn is recorded", workflow: tau.workflow};
  const text = workflowOf(it), before = nodeNames(turn > 1 ? workflowOf(turns[turn - 2]) : ""), now = nodeNames(text);
  const mark = {ran: new Set(it.executed || []), failed: new Set(it.failed || []),
    fresh: new Set([...now].filter(([id, name]) => before.get(id) !== name).map(([id]) => id))};
  const refused = it.ok === false, [reasoning, edit] = splitEdit(say(it.text));
  const button = (words, to, label, attributes) => h("button",
    {onclick: () => goTo(to), disabled: to < 1 || to > turns.length, "aria-label": label, "data-key": label,
      ...attributes}, words);
  const card = (title, ...body) => h("div", {class: "card"}, h("h3", {}, title), body);
  const named = (word, ids) => ids.size && `${word}: ${[...ids].join(", ")}`;
  const legend = [mark.fresh.size && "dashed outline: new or changed",
    named("ran", mark.ran), named("failed", mark.failed)];
  $("status").textContent = `Turn ${turn}: ${say(it.edit)}${refused ? ", not accepted" : ""}`;
  return [
    h("div", {class: "card"},
      h("div", {class: "turns"},
        button("← previous", turn - 1, "Previous turn"), button("next →", turn + 1, "Next turn"),
        turns.map((one, i) => button(one.ok === false ? `${i + 1} ✗` : i + 1, i + 1, `Turn ${i + 1}`,
          {class: one.ok === false && "no", title: say(one.edit), "aria-current": i + 1 === turn && "true"}))),
      h("p", {style: "margin: 10px 0 2px"}, `Turn ${turn} of ${turns.length}: `, h("b", {}, say(it.edit) || "–"),
        refused && h("span", {class: "minus"}, " ✗ not accepted")),
      drawWorkflow(text, mark), h("div", {class: "meaning"}, legend.filter(Boolean).join(" · "))),
    h("div", {class: "two"},
      card("The policy writes", reasoning && h("pre", {class: "soft"}, reasoning), h("pre", {}, edit)),
      card("The canvas answers", h("pre", {}, say(it.feedback) || "–"))),
    h("div", {class: "two"}, card("Answer", h("pre", {}, say(tau.answer) || "–")),
      card("Gold", h("pre", {}, (tau.answers || []).map(say).join("\nor: ")))),
  ];
}

function showBrowser(page) {
  const rows = page.trajectories;
  if (!rows.length) return $("browser").replaceChildren("No trajectory is recorded yet.");
  let index = -1, turn = 0, tau = null;  // what is open: its place in rows, the 1-based turn, the parsed record
  const link = row => `#step=${row.step}&tau=${row.tau}`;
  const visible = () => rows.map((row, place) => ({...row, place}))
    .filter(row => String(row.step) === $("step").value && ["", say(row.source)].includes($("source").value))
    .sort((a, b) => Number($("order").value) * (a.reward - b.reward));  // order 0: a stable sort keeps them as sampled

  function keepingFocus(element, draw) {  // drawing anew must not throw a keyboard user back to the top of the page
    const key = element.contains(document.activeElement) && document.activeElement.dataset.key;
    draw();
    const again = key && element.querySelector(`[data-key="${key}"]:not(:disabled)`);
    if (key) (again || element.querySelector("[aria-current]"))?.focus();
  }
  function showList() {
    keepingFocus($("list"), () => $("list").replaceChildren(...visible().map(row => h("li", {},
      h("a", {href: link(row), "data-key": "row" + row.place, "aria-current": row.place === index && "true"},
        h("span", {class: `reward ${sign(row.reward)}`}, signed(row.reward)),
        h("span", {title: say(row.task_id)}, say(row.task_id) || say(row.source)),
        h("span", {class: "soft"}, `${row.turns} ${row.turns === 1 ? "turn" : "turns"}`))))));
    const [row, area] = [$("list").querySelector("[aria-current]"), $("list")].map(it => it?.getBoundingClientRect());
    if (row) $("list").scrollTop += Math.min(0, row.top - area.top) + Math.max(0, row.bottom - area.bottom);
  }
  function showTurn(wanted) {
    turn = Math.max(1, Math.min((tau.turns || []).length, wanted));
    keepingFocus($("detail"), () => $("detail").replaceChildren(...tauHead(tau),
      h("div", {class: "card"}, h("h3", {}, "Task"), h("pre", {}, say(tau.problem))), ...tauTurn(tau, turn, goTo)));
  }
  function goTo(wanted) {
    showTurn(wanted);
    history.replaceState(null, "", `${link(rows[index])}&turn=${turn}`);
  }
  function open(place, wanted = Infinity) {  // the last turn, where the workflow is complete, unless told otherwise
    [index, tau] = [place, JSON.parse($(`tau-${place}`).textContent)];
    $("step").value = String(rows[place].step);
    if ($("source").value !== say(rows[place].source)) $("source").value = "";
    showList();
    showTurn(wanted);
  }
  function openAddress() {  // true if the address asks for a trajectory, be it here or not
    const asked = new URLSearchParams(location.hash.slice(1)), nth = Number(asked.get("tau") || 0);
    if (!asked.has("step")) return false;
    const place = rows.findIndex(row => String(row.step) === asked.get("step") && row.tau === nth);
    if (place >= 0) open(place, Number(asked.get("turn")) || Infinity);
    else $("detail").replaceChildren(h("p", {class: "note"},
      `Step ${asked.get("step")}, trajectory ${nth} is not in this page.`));
    return true;
  }
  function openFirst() {
    const [first] = visible();
    if (first) location.hash = link(first);
    else showList();
  }
  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !tau) return;
    if (event.target.matches("input, select, pre, .drawing")) return;  // there the keys have a meaning of their own
    const shown = visible(), move = {ArrowLeft: -1, ArrowRight: 1}[event.key], other = {k: -1, j: 1}[event.key];
    if (move) goTo(turn + move);
    const next = other && shown[shown.findIndex(row => row.place === index) + other];
    if (next) location.hash = link(next);
    if (move || other) event.preventDefault();
  }

  const rewards = new Map();
  for (const row of rows) rewards.set(row.step, [...(rewards.get(row.step) || []), row.reward].filter(r => r != null));
  for (const [step, of] of rewards)
    $("step").append(h("option", {value: step}, `${step} (mean reward ${signed(mean(of))})`));
  $("source").append(...[...new Set(rows.map(row => say(row.source)))].map(name => h("option", {value: name}, name)));
  $("step").addEventListener("change", openFirst);
  $("source").addEventListener("change", openFirst);
  $("order").addEventListener("change", showList);
  addEventListener("hashchange", openAddress);
  addEventListener("keydown", onKey);
  $("step").value = String(rows[rows.length - 1].step);
  if (openAddress()) $("replay").scrollIntoView();
  else open(visible().reduce((best, row) => row.reward > best.reward ? row : best).place);  // the last step's best
}

const page = JSON.parse($("page").textContent);
showSummary(page);
showCurves(page);
showDesigns(page);
showBrowser(page);
