// Example requests. `second` is a second instruction to compare with the first one.

export const EXAMPLES = [
  {
    name: "Web search",
    lang: "en",
    query: "how do I reset my wifi router to factory settings",
    documents: [
      "Our factory was set up in 1982 and employs four hundred people.",
      "Wireless networks use radio waves in the 2.4 and 5 gigahertz bands.",
      "Hold the small button on the back of the router for ten seconds until the lights blink; this restores the factory defaults.",
      "To reset your password, click the link in the email we sent you.",
      "The kitchen clock has to be set again after a power cut.",
    ],
  },
  {
    name: "Two instructions",
    lang: "en",
    query: "side effects of ibuprofen",
    instruction: "Retrieve passages that answer the question for a patient, in plain words",
    second: "Retrieve clinical trials that report measured rates of adverse events",
    documents: [
      "Ibuprofen can upset your stomach. Take it with food, and see a doctor if you notice black stools or a rash.",
      "In a randomised trial of 1,204 adults, 11.2 % of the ibuprofen arm reported dyspepsia against 6.8 % on placebo.",
      "Ibuprofen is sold under many brand names and has been available without a prescription since 1984.",
      "Paracetamol can harm the liver when too much of it is taken over several days.",
      "Adverse events in the ibuprofen group: headache 4.1 %, nausea 3.7 %, renal impairment 0.3 % (n = 842, 12 weeks).",
    ],
  },
  {
    name: "网页搜索",
    lang: "zh",
    query: "什么是文本排序模型",
    documents: [
      "文本排序模型广泛用于搜索引擎和推荐系统中，它们根据文本相关性对候选文本进行排序",
      "量子计算是计算科学的一个前沿领域",
      "预训练语言模型的发展给文本排序模型带来了新的进展",
    ],
  },
  {
    name: "客服问答",
    lang: "zh",
    query: "买错了尺码，怎么换货？",
    instruction: "根据用户的问题，找出能够解决问题的客服回答",
    documents: [
      "收到商品七天内，在“我的订单”里点击“申请换货”，选择需要的尺码，快递员会上门取件。",
      "本店商品尺码齐全，从 S 到 XXL，欢迎选购。",
      "发票会在发货后三天内以电子邮件的形式寄出。",
      "换货商品须保持吊牌完好、未经洗涤，来回运费由买家承担。",
      "尺码表：M 码适合身高 165 到 170 厘米。",
    ],
  },
];
