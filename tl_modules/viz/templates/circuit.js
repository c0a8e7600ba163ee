for (const root of document.querySelectorAll(".tlm-circuit:not([data-live])")) (() => {
  root.dataset.live = "";
  root.classList.add("live");
  const svg = root.querySelector("svg"), tip = root.querySelector(".tlm-tip");
  const edges = [...svg.querySelectorAll(".edge")], nodes = [...svg.querySelectorAll(".node")];
  const slide = root.querySelector(".tlm-slide"), range = slide.querySelector("input"), told = slide.querySelector("output");
  let pinned = null;

  const follow = (event) => {
    const box = root.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    tip.style.left = Math.max(0, Math.min(x + 14, box.width - tip.offsetWidth - 4)) + "px";
    tip.style.top = (y > tip.offsetHeight + 20 ? y - tip.offsetHeight - 12 : y + 18) + "px";
  };
  const tell = (element) => {
    const title = element.querySelector("title");
    const text = title.textContent;
    title.remove();
    element.setAttribute("aria-label", text);
    element.addEventListener("pointerenter", (event) => { tip.textContent = text; tip.hidden = false; follow(event); });
    element.addEventListener("pointermove", follow);
    element.addEventListener("pointerleave", () => { tip.hidden = true; });
  };
  const shown = (edge) => edge.style.display !== "none";
  const light = (number) => {
    svg.classList.toggle("focus", number !== null);
    for (const element of [...edges, ...nodes]) element.classList.remove("on");
    for (const edge of edges) if (shown(edge) && (edge.dataset.source === number || edge.dataset.target === number)) {
      edge.classList.add("on");
      nodes[+edge.dataset.source].classList.add("on");
      nodes[+edge.dataset.target].classList.add("on");
    }
    if (number !== null) nodes[+number].classList.add("on");
  };
  const pin = (node) => {
    pinned = node && node.dataset.node !== pinned ? node.dataset.node : null;
    for (const other of nodes) other.classList.toggle("chosen", other.dataset.node === pinned);
    light(pinned);
    const module = pinned === null ? undefined : node.dataset.module;
    for (const list of root.querySelectorAll(".tlm-units details")) list.open = list.dataset.module === module;
  };
  const cut = () => {
    const least = (range.value / 100) ** 2, joined = new Set();
    let n = 0;
    for (const edge of edges) {
      const keep = +edge.dataset.share >= least;
      edge.style.display = keep ? "" : "none";
      if (keep) { n++; joined.add(edge.dataset.source); joined.add(edge.dataset.target); }
    }
    for (const node of nodes) {
      if (joined.has(node.dataset.node)) node.removeAttribute("opacity"); else node.setAttribute("opacity", "0.35");
    }
    told.textContent = `${(100 * least).toFixed(1)} % of the strongest: ${n} edges`;
    light(pinned);
  };
  edges.forEach(tell);
  for (const node of nodes) {
    tell(node);
    node.addEventListener("pointerenter", () => { if (pinned === null) light(node.dataset.node); });
    node.addEventListener("pointerleave", () => { if (pinned === null) light(null); });
    node.addEventListener("click", (event) => { event.stopPropagation(); pin(node); });
    if (node.dataset.module === undefined) continue;
    node.setAttribute("tabindex", "0");
    node.setAttribute("role", "button");
    node.addEventListener("keydown", (event) => { if (event.key === "Enter") pin(node); });
  }
  svg.addEventListener("click", () => pin(null));
  slide.hidden = false;
  range.addEventListener("input", cut);
  told.textContent = slide.dataset.told;
})();
