"""The page that `lstmcore.inspect.page` fills: HTML, style and script, which needs no network.

Alone, because none of it is Python. @TITLE@, @DARK@ and @DATA@ are filled in.
"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
  * { box-sizing: border-box }
  body { margin: 0; font: 16px/1.4 system-ui, sans-serif; color: #222; background: #fff }
  header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ddd;
           padding: .5rem .8rem; z-index: 1 }
  h1 { font-size: 1.05rem; margin: 0 0 .4rem }
  .row { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center }
  select, button, input { font: inherit; padding: .3rem .5rem; min-height: 2.4rem;
           border: 1px solid #bbb; border-radius: .4rem; background: #fff; color: inherit }
  input { width: 5em }
  .group { display: inline-flex; gap: .3rem; align-items: center }
  #status { font-size: .9rem; color: #555; min-height: 1.4em; margin-top: .3rem }
  main { display: grid; grid-template-columns: minmax(0, 1fr) 19rem; gap: 1rem; padding: .8rem }
  #text { font: 15px/1.65 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
           overflow-wrap: anywhere; margin: 0 }
  #text span { border-radius: 2px; padding: .12em 0 }
  #text i { font-style: normal; opacity: .35 }
  h2 { font-size: .95rem; margin: .2rem 0 }
  aside p { font-size: .85rem; color: #666; margin: .2rem 0 .5rem }
  ol { list-style: none; margin: 0; padding: 0 }
  ol button { width: 100%; text-align: left; margin-bottom: .25rem; font-size: .9rem;
           display: flex; gap: .5rem; align-items: center }
  ol button b { min-width: 2.6em } ol button span { flex: 1; overflow-wrap: anywhere }
  ol button.on { border-color: #222; background: #f2f2f2 }
  aside { position: sticky; top: 7.5rem; align-self: start; max-height: calc(100vh - 8rem);
           overflow-y: auto; padding: 0 .2rem }
  #text.wide { line-height: 1.15 }
  #text.wide .t { display: inline-block; vertical-align: top; text-align: center; padding: .1em 0;
           margin-bottom: .5em; min-width: 1.1ch }
  #text .g, #text br, #text.wide .n { display: none }
  #text.wide .g { display: block; font-size: .8em; white-space: pre; color: #222; padding: 0 .1em;
           border-radius: 0 }
  #text.wide br { display: inline }
  label { display: inline-flex; gap: .3rem; align-items: center; font-size: .9rem }
  label input { width: auto; min-height: 0 }
  #gates { display: flex; gap: .5rem; flex-wrap: wrap; margin-bottom: .6rem }
  #gates figure { margin: 0 } #gates figcaption { font-size: .8rem; color: #555 }
  #gates svg { width: 5.6rem; height: 5.6rem; border: 1px solid #ccc; background: #fafafa }
  #gates circle { fill: #008060; opacity: .45; cursor: pointer }
  #gates circle.on { fill: #ca0020; opacity: 1 }
  #scale { display: inline-block; width: 8rem; height: .8rem; border: 1px solid #ccc }
  @media (max-width: 900px) {
    main { grid-template-columns: minmax(0, 1fr) }
    ol { display: flex; overflow-x: auto; gap: .4rem } ol li { flex: 0 0 12rem }
    aside { order: -1; min-width: 0; position: static; overflow: visible }
    #text { font-size: 14px }
  }
</style>
<header>
  <h1>@TITLE@</h1>
  <div class="row">
    <select id="place" aria-label="layer"></select>
    <select id="signal" aria-label="signal"></select>
    <span class="group">
      <button id="back" aria-label="previous neuron">&#9664;</button>
      <input id="neuron" type="number" min="0" aria-label="neuron">
      <button id="next" aria-label="next neuron">&#9654;</button>
    </span>
    <span class="group"><span id="low"></span><span id="scale"></span>1</span>
    <label id="ask"><input id="wide" type="checkbox"> what it expects next</label>
  </div>
  <div id="status"></div>
</header>
<main>
  <pre id="text"></pre>
  <aside>
    <h2 id="open">Gates: how often shut and open</h2>
    <div id="gates"></div>
    <h2>Most selective neurons</h2>
    <p id="told"></p>
    <ol id="ranked"></ol>
  </aside>
</main>
<svg id="svg" hidden></svg>
<script id="data" type="application/json">@DATA@</script>
<script>
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = id => document.getElementById(id);
  const RED = [202, 0, 32], BLUE = [33, 102, 172], GREEN = [0, 128, 96], ORANGE = [240, 140, 0];
  const decoded = new Map();
  let [place, signal, neuron] = data.opening;
  const SEEN = {"\\n": "\\u21b5", "\\t": "\\u2192", " ": "\\u2423"};
  const visible = token => token.replace(/[\\n\\t ]/g, c => SEEN[c]);

  const spans = data.tokens.map((token, t) => {
    const span = document.createElement("span");
    span.className = "t";
    for (const part of token.split(/(\\n)/)) {
      if (part !== "\\n") { span.append(part); continue; }
      const mark = document.createElement("i");
      mark.textContent = "\\u21b5";
      const end = document.createElement("span");
      end.className = "n";
      end.textContent = "\\n";
      span.append(mark, end);
    }
    const tell = () => {
      const next = data.guesses ? "; next " + data.guesses[t].map(([token, p]) =>
        `${JSON.stringify(token)} ${Math.round(100 * p)} %`).join(", ") : "";
      find("status").textContent = `${JSON.stringify(token)}: ${value(t).toFixed(2)}${next}`;
    };
    span.onmouseenter = span.onclick = tell;
    find("text").append(span);
    if (token.endsWith("\\n")) find("text").append(document.createElement("br"));
    return span;
  });

  function widen() {
    if (find("wide").checked && !document.querySelector("#text .g"))
      spans.forEach((span, t) => data.guesses[t].forEach(([token, p]) => {
        const guess = document.createElement("span");
        guess.className = "g";
        guess.textContent = visible(token);
        guess.title = `${Math.round(100 * p)} %`;
        guess.style.background = `rgb(${ORANGE.map(c => Math.round(255 + (c - 255) * p)).join()})`;
        span.append(guess);
      }));
    find("text").classList.toggle("wide", find("wide").checked);
  }

  const SVG = find("svg").namespaceURI;
  function gates() {
    const shares = Object.entries(data.places[place].saturation);
    find("open").hidden = !shares.length;
    find("gates").replaceChildren(...shares.map(([gate, points]) => {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("viewBox", "-4 -4 108 108");
      points.forEach(([shut, open], n) => {
        const dot = document.createElementNS(SVG, "circle");
        dot.setAttribute("cx", 100 * open);
        dot.setAttribute("cy", 100 - 100 * shut);
        dot.setAttribute("r", 3);
        dot.dataset.neuron = n;
        dot.onclick = () => { neuron = n; show(); };
        svg.append(dot);
      });
      caption.textContent = `${gate}: \\u2191 shut, \\u2192 open`;
      figure.append(svg, caption);
      return figure;
    }));
  }

  const current = () => data.places[place].signals[signal];
  const gate = () => data.gates.includes(signal);

  function bytes() {
    const key = place + signal;
    if (!decoded.has(key))
      decoded.set(key, Uint8Array.from(atob(current().bytes), c => c.charCodeAt(0)));
    return decoded.get(key);
  }

  function value(t) {
    const share = bytes()[t * current().width + neuron] / 254;
    return gate() ? share : 2 * share - 1;
  }

  function color(v) {
    const end = v < 0 ? BLUE : gate() ? GREEN : RED, share = Math.min(Math.abs(v), 1);
    return `rgb(${end.map(p => Math.round(255 + (p - 255) * share)).join()})`;
  }

  function show() {
    const entry = current(), known = entry.ranked.find(r => r[0] === neuron);
    find("neuron").value = neuron;
    find("neuron").max = entry.width - 1;
    find("low").textContent = gate() ? "0" : "\\u22121";
    find("scale").style.background = "linear-gradient(to right," +
      [gate() ? 0 : -1, gate() ? .5 : 0, 1].map(color).join() + ")";
    spans.forEach((span, t) => {
      const v = value(t);
      span.style.background = color(v);
      span.style.color = Math.abs(v) > @DARK@ ? "#fff" : "#222";
    });
    find("status").textContent = known
      ? `neuron ${neuron} follows: ${known[1]} (r = ${known[2].toFixed(2)}, ` +
        `${known[3].toFixed(2)} of it beyond the token just read)`
      : `neuron ${neuron} of 0 to ${entry.width - 1}`;
    const shares = Object.entries(data.places[place].saturation).map(([gate, points]) =>
      `${gate} shut ${Math.round(100 * points[neuron][0])} %, open ${Math.round(100 * points[neuron][1])} %`);
    if (shares.length) find("status").textContent += "; " + shares.join("; ");
    for (const dot of find("gates").querySelectorAll("circle"))
      dot.classList.toggle("on", +dot.dataset.neuron === neuron);
    for (const button of find("ranked").querySelectorAll("button"))
      button.classList.toggle("on", +button.dataset.neuron === neuron);
  }

  function step(by) {
    neuron = (neuron + by + current().width) % current().width;
    show();
  }

  function list() {
    find("told").textContent = current().ranked.length
      ? "What each follows best in the first half of this text, and the correlation in the second; by " +
        `chance one in twenty has ${current().chance.toFixed(2)}.`
      : "None yet: in a text this short nothing is seen often enough.";
    find("ranked").replaceChildren(...current().ranked.map(([n, feature, r]) => {
      const item = document.createElement("li"), button = document.createElement("button");
      const parts = [["b", n], ["span", feature], ["em", r.toFixed(2)]].map(([tag, text]) => {
        const part = document.createElement(tag);
        part.textContent = text;
        return part;
      });
      button.dataset.neuron = n;
      button.append(...parts);
      button.onclick = () => { neuron = n; show(); };
      item.append(button);
      return item;
    }));
  }

  function signals() {
    const names = Object.keys(data.places[place].signals);
    find("signal").replaceChildren(...names.map(s => new Option(data.meanings[s], s)));
    find("signal").value = signal;
  }

  function best() {
    const worth = current().ranked.reduce((a, b) => Math.abs(b[3]) > Math.abs(a[3]) ? b : a, [0, "", 0, -1]);
    neuron = worth[0];
    list();
    show();
  }

  data.places.forEach((p, n) => find("place").append(new Option(p.name, n)));
  find("place").value = place;
  find("place").onchange = event => { place = +event.target.value; signals(); gates(); best(); };
  find("signal").onchange = event => { signal = event.target.value; best(); };
  find("neuron").onchange = event => {
    const asked = Math.trunc(+event.target.value) || 0;
    neuron = Math.max(0, Math.min(asked, current().width - 1));
    show();
  };
  find("back").onclick = () => step(-1);
  find("next").onclick = () => step(1);
  find("wide").onchange = widen;
  find("ask").hidden = !data.guesses;
  signals();
  gates();
  list();
  show();
</script>
</html>
"""
