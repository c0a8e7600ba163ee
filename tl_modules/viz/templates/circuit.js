for (const root of document.querySelectorAll(".tlm-circuit:not([data-live])")) (() => {
  root.dataset.live = "";
  root.classList.add("live");
  const svg = root.querySelector("svg"), tip = root.querySelector(".tlm-tip");
  const edges = [...svg.querySelectorAll(".edge")], nodes = [...svg.querySelectorAll(".node")];
  const slide = root.querySelector(".tlm-slide"), range = slide.querySelector("input"), told = slide.querySelector("output");
  let pinned = [];

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
  const light = (some) => {
    const lit = new Set(some);
    svg.classList.toggle("focus", some.length > 0);
    for (const element of [...edges, ...nodes]) element.classList.remove("on");
    for (const edge of edges) {
      const ends = [nodes[+edge.dataset.source], nodes[+edge.dataset.target]];
      if (shown(edge) && ends.some((end) => lit.has(end))) [edge, ...ends].forEach((one) => one.classList.add("on"));
    }
    some.forEach((node) => node.classList.add("on"));
  };
  const pin = (node) => {
    const module = node ? node.dataset.module : undefined;
    const family = nodes.filter((other) => other === node || (module !== undefined && other.dataset.module === module));
    pinned = pinned.includes(node) ? [] : family;
    for (const other of nodes) other.classList.toggle("chosen", pinned.includes(other));
    light(pinned);
    for (const list of root.querySelectorAll(".tlm-units details")) list.open = pinned.length > 0 && list.dataset.module === module;
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
      if (joined.has(node.dataset.node) || node.classList.contains("target")) node.removeAttribute("opacity"); else node.setAttribute("opacity", "0.35");
    }
    told.textContent = `${(100 * least).toFixed(1)} % of the strongest: ${n} edges`;
    light(pinned);
  };
  for (const edge of edges) {
    const wide = edge.querySelector("path").cloneNode();
    wide.setAttribute("stroke-width", "10");
    wide.setAttribute("stroke-opacity", "0");
    edge.append(wide);
    tell(edge);
  }
  for (const node of nodes) {
    tell(node);
    node.addEventListener("pointerenter", () => { if (!pinned.length) light([node]); });
    node.addEventListener("pointerleave", () => { if (!pinned.length) light([]); });
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
