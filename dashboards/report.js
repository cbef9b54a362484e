// Reading the learning curves: pointing at one panel, or arrow keys in it, moves one epoch line through all of its group.
"use strict";
for (const group of document.querySelectorAll(".panels")) {
  const panels = [...group.querySelectorAll(".panel")].map((figure) => {
    const svg = figure.querySelector("svg.panel-chart"), data = svg.dataset;
    const [low, high, left, right] = [data.low, data.high, data.left, data.right].map(Number);
    const readout = figure.querySelector(".readout");
    return { figure, svg, low, high, left, right, readout, said: readout.textContent,
             cursor: svg.querySelector(".cursor"), readings: JSON.parse(data.readings) };
  });
  const nearest = (panel, epoch) => panel.readings.reduce(
    (best, one) => Math.abs(one[0] - epoch) < Math.abs(best[0] - epoch) ? one : best);
  const show = (epoch) => {
    for (const panel of panels) {
      if (panel.readings.length === 0) continue;
      const [at, words] = nearest(panel, epoch);
      const x = panel.left + (at - panel.low) / (panel.high - panel.low) * (panel.right - panel.left);
      panel.cursor.setAttribute("x1", x);
      panel.cursor.setAttribute("x2", x);
      panel.cursor.style.visibility = "visible";
      panel.readout.textContent = words;
      panel.at = at;
    }
  };
  const hide = () => {
    for (const panel of panels) {
      panel.cursor.style.visibility = "hidden";
      panel.readout.textContent = panel.said;
    }
  };
  for (const panel of panels) {
    panel.figure.addEventListener("pointermove", (event) => {
      const box = panel.svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * panel.svg.viewBox.baseVal.width;
      show(panel.low + (x - panel.left) / (panel.right - panel.left) * (panel.high - panel.low));
    });
    panel.figure.addEventListener("pointerleave", hide);
    panel.figure.addEventListener("blur", hide);
    panel.figure.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way || panel.readings.length === 0) return;
      event.preventDefault();
      const epochs = panel.readings.map((one) => one[0]);
      const index = epochs.indexOf(panel.at ?? epochs[epochs.length - 1]);
      show(epochs[Math.min(Math.max(index + way, 0), epochs.length - 1)]);
    });
  }
}
