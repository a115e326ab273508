
"use strict";
{
  document.documentElement.classList.add("js");

  // charts: point at one and every chart of the page shows its values there
  const charts = [...document.querySelectorAll("figure.readable")].map((figure) => {
    const { x, label, values } = JSON.parse(figure.querySelector("script.readings").textContent);
    const [shown, drawings] = [".legend b", "svg[data-left]"].map((selector) => [...figure.querySelectorAll(selector)]);
    return { figure, x, label, values, shown, drawings, at: figure.querySelector(".at") };
  });
  const nearest = (x, wanted) => x.reduce((best, value, i) => (Math.abs(value - wanted) < Math.abs(x[best] - wanted) ? i : best), 0);
  let reading = null;
  const show = (chart, i, pointed) => {
    chart.figure.classList.toggle("reading", pointed);
    chart.at.textContent = `${chart.label} ${chart.x[i]}`;
    chart.shown.forEach((element, s) => { element.textContent = chart.values[s][i]; });
    for (const drawing of chart.drawings) {
      const [left, right, low, high] = ["left", "right", "low", "high"].map((name) => +drawing.dataset[name]);
      const place = left + ((chart.x[i] - low) / (high - low)) * (right - left);
      const cursor = drawing.querySelector(".cursor");
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
    }
  };
  const read = (label, wanted) => {
    reading = wanted;
    for (const chart of charts) if (chart.label === label) show(chart, nearest(chart.x, wanted), true);
  };
  const rest = () => {
    reading = null;
    for (const chart of charts) show(chart, chart.x.length - 1, false);
  };
  for (const chart of charts) {
    for (const drawing of chart.drawings) {
      const point = (event) => {
        const box = drawing.getBoundingClientRect();
        const [left, right, low, high] = ["left", "right", "low", "high"].map((name) => +drawing.dataset[name]);
        const unit = ((event.clientX - box.left) / box.width) * drawing.viewBox.baseVal.width;
        read(chart.label, low + ((unit - left) / (right - left)) * (high - low));
      };
      drawing.addEventListener("pointermove", point);
      drawing.addEventListener("pointerdown", point);
      drawing.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") rest(); });
    }
    chart.figure.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") return rest();
      if (!step) return;
      event.preventDefault();
      const now = reading === null ? chart.x.length - 1 : nearest(chart.x, reading);
      read(chart.label, chart.x[Math.min(chart.x.length - 1, Math.max(0, now + step))]);
    });
    chart.figure.addEventListener("blur", rest);
  }

  // the strip: one image per epoch, moved by a slider
  for (const strip of document.querySelectorAll(".strip")) {
    const [first, now] = [strip.querySelector(".first"), strip.querySelector(".now")];
    const put = (figure, uri) => { for (const image of figure.querySelectorAll("img")) image.src = uri; };
    put(now, now.querySelector("img").src);
    if (!first) continue;
    put(first, first.querySelector("img").src);
    const frames = JSON.parse(strip.querySelector("script.frames").textContent);
    frames[0][1] = first.querySelector("img").src;
    frames[frames.length - 1][1] = now.querySelector("img").src;
    const [slider, name, hold] = [strip.querySelector("input"), strip.querySelector("output"), strip.querySelector(".hold")];
    const display = (i) => {
      name.textContent = frames[i][0];
      now.querySelector("img").alt = `preview images, ${frames[i][0]}`;
      slider.setAttribute("aria-valuetext", frames[i][0]);
      put(now, frames[i][1]);
    };
    const move = (step) => {
      slider.value = +slider.value + step;
      display(+slider.value);
    };
    slider.addEventListener("input", () => display(+slider.value));
    strip.querySelector(".back").addEventListener("click", () => move(-1));
    strip.querySelector(".on").addEventListener("click", () => move(1));
    const press = () => display(0);
    const release = () => display(+slider.value);
    hold.addEventListener("pointerdown", press);
    for (const event of ["pointerup", "pointercancel", "pointerleave", "blur"]) hold.addEventListener(event, release);
    hold.addEventListener("keydown", (event) => { if (event.key === " " || event.key === "Enter") press(); });
    hold.addEventListener("keyup", release);
    hold.addEventListener("contextmenu", (event) => event.preventDefault());
    display(+slider.value);  // a browser may restore the slider's old place
  }

  // side by side: any prompt, any checkpoint beside its base
  for (const side of document.querySelectorAll(".compare")) {
    const { images, prompts, models, bases, scores } = JSON.parse(side.querySelector("script.images").textContent);
    const [prompt, model] = [side.querySelector(".prompt"), side.querySelector(".model")];
    const fill = (row, index) => {
      row.querySelector("figcaption").textContent = models[index];
      const cells = [...row.querySelectorAll("img")];
      cells.forEach((cell, i) => {
        const uri = (images[index][prompt.value] || [])[i];
        cell.hidden = !uri;
        if (uri) cell.src = uri;
        cell.alt = uri ? `${models[index]}: ${prompts[prompt.value]}` : "";
      });
    };
    const display = () => {
      fill(side.querySelector(".left"), bases[model.value]);
      fill(side.querySelector(".right"), +model.value);
      side.querySelectorAll("tbody tr").forEach((row, reward) => {
        const cells = scores[model.value][prompt.value][reward];
        row.querySelectorAll("td").forEach((cell, i) => { cell.textContent = cells[i]; });
      });
    };
    const step = (select, by) => {
      select.selectedIndex = (select.selectedIndex + by + select.options.length) % select.options.length;
      display();
    };
    for (const select of [prompt, model]) select.addEventListener("change", display);
    for (const button of side.querySelectorAll("button")) {
      button.addEventListener("click", () => step(side.querySelector(`.${button.dataset.of}`), +button.dataset.by));
    }
    display();
  }
}
