(() => {
  const source = document.getElementById("curve");
  if (!source) return;
  const { train, held } = JSON.parse(source.textContent);
  const plot = document.querySelector(".plot"), tip = plot.querySelector(".tip");
  const whole = new Intl.NumberFormat("en");
  const nearest = (rows, place, tokens) =>
    rows.reduce((best, row) => (Math.abs(row[place] - tokens) < Math.abs(best[place] - tokens) ? row : best));
  for (const svg of plot.querySelectorAll("svg")) {
    const cursor = svg.querySelector(".cursor");
    const left = +svg.dataset.left, right = +svg.dataset.right, end = +svg.dataset.end;
    const hide = () => { tip.hidden = true; cursor.style.visibility = "hidden"; };
    const show = (event) => {
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      const at = Math.min(right, Math.max(left, (event.clientX - box.left) * scale));
      const row = nearest(train, 1, ((at - left) / (right - left)) * end);
      const x = left + (row[1] / end) * (right - left);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.style.visibility = "visible";
      const seen = held.length ? nearest(held, 0, row[1]) : null;
      tip.innerHTML = `<b>step ${whole.format(row[0])}</b> · ${whole.format(row[1])} tokens<br>`
        + `<span class="t">training ${row[2].toFixed(3)}</span>`
        + (seen ? `<br><span class="h">held out ${seen[1].toFixed(3)}</span> at ${whole.format(seen[0])}` : "")
        + `<br>learning rate ${row[3].toPrecision(3)}`;
      tip.hidden = false;
      const place = x / scale, room = box.width - place;
      tip.style.left = room > tip.offsetWidth + 16 ? `${place + 12}px` : `${Math.max(0, place - tip.offsetWidth - 12)}px`;
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }
})();
