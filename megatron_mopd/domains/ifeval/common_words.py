"""The commonest function words of each language that shares its script, and the letters that only it uses."""

# ruff: noqa: RUF001

from __future__ import annotations

_WORDS = {
    "en": "the of and to a in is it you that he was for on are with as i his they be at one have this from or had by"
    " but not what all were we when your can said there an which she do their if will how about up out them then so"
    " would my me our who its here these been has more no just it's don't i'm let's into may some any could than"
    " other where why yes please am hello dear after over also us her him each very make get like",
    "es": "el la los las de que y en un una es por con para su se no lo como más pero sus le ya o este sí porque esta"
    " entre cuando muy sin sobre también me hasta hay donde quien desde todo nos durante todos uno les ni contra ese"
    " eso ante ellos e esto mí antes algunos qué unos yo otro otras ser son fue está del al puede tiene hola gracias",
    "pt": "o a os as de que e do da dos das em um uma é para com não por mais se na no nas nos como mas foi ao ele ela"
    " sua seu ou quando muito há já está eu também só pelo pela até isso entre era depois sem mesmo aos ter seus quem"
    " me esse eles você essa num nem suas meu às minha são olá obrigado isto pode ser este esta",
    "fr": "le la les de des du un une et à est en que qui dans pour pas sur ce cette ces il elle ils elles je tu nous"
    " vous ne se sont par avec au aux plus mais ou où comme être avoir fait son sa ses leur leurs tout tous on y été"
    " si bien peut aussi très mon ma mes c'est d'un d'une qu'il n'est l'on merci bonjour votre notre cela même",
    "de": "der die das und ist in den von zu mit sich des auf für nicht ein eine einen einem einer als auch es an"
    " werden aus er hat dass sie nach wird bei um am sind noch wie über so zum war haben nur oder aber vor zur bis"
    " mehr durch man sein wurde sehr ich du wir ihr mein dein kann wenn im vom diese dieser dieses hallo danke",
    "it": "il lo la i gli le di che e è un una in per non con si del della dei delle degli da al alla ai alle come"
    " più ma anche sono nel nella nei questo questa ha o se suo sua ci dal dalla io tu lui lei noi voi loro essere"
    " molto quando tutto tutti ogni senza tra fra dopo dove chi cosa perché può essi ciao grazie mi ti",
    "pl": "i w na z do że się nie jest to o jak za od po co ale tak jego jej ich przez dla przy był była było są być"
    " tylko czy oraz już może ten ta te tym tego które który która ja ty on ona my wy oni mnie mi pod przed gdy gdzie"
    " lub bardzo więc jednak we ze dzień dobry dziękuję",
    "vi": "và của là có không được cho một những các trong với người đã này khi để ở cũng như từ về ra đến bạn tôi"
    " thì rằng nhưng nó sẽ còn vào trên lại đó mà làm rất nhiều theo hay hoặc vì nếu phải chúng ta anh em bị thể"
    " xin chào cảm ơn",
    "sw": "na ya wa kwa ni la katika za cha kuwa hii hiyo huo hilo au kama lakini si yake wake zake sana pia watu"
    " mtu wote yote zote hapa huko mimi wewe yeye sisi ninyi wao kila baada kabla bila nini nani ambayo ambao hivyo"
    " basi tu vya mwa kuna ili moja habari asante karibu wakati siku mambo nyumba maisha wapi naweza ninaweza lini",
    "fi": "ja on ei se että oli hän ovat joka mutta kun myös jos kuin tämä sen ole niin tai mitä olla minä sinä me"
    " te he nyt vain jo vielä mukaan kanssa sekä siitä ne voi sitä ollut hänen joka jotka koska siis hyvin kaikki"
    " minun sinun olen olet olemme mikä missä miten hei kiitos tämän",
    "nl": "de het een en van ik te dat die in is niet zijn op aan met als voor er maar om hem dan zou of wat mijn"
    " men dit zo door over ze zich bij ook tot je mij uit daar naar heb hoe heeft hebben deze want nog zal wij onze"
    " wordt geen werd kan meer jij u",
    "sv": "och att det som en på är av för med till den har de inte om ett han men var jag sig från vi så kan när år"
    " hon under också efter eller nu sin där vid mot ska skulle kommer ut får finns vara hade alla andra mycket än här"
    " du din min hej tack",
    "tr": "ve bir bu da de için ile çok olarak daha gibi olan sonra kadar ne ama en var ben sen o biz siz onlar"
    " değil mi her şey nasıl neden ya ki veya diye göre ise bütün bazı olduğu merhaba teşekkürler",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya ke karena tersebut bisa ada mereka"
    " lebih kata tahun sudah atau saat oleh menjadi orang ia telah adalah seperti sebagai bahwa dapat para harus"
    " anda kami kita",
    "ru": "и в не на я что он с как это но по все она так его за был от о у же ты из мы вы бы то для было меня еще ещё"
    " только когда или быть ни если нет мне очень они этот может уже есть их чтобы который которые при также была были"
    " вас нас без до где могу можно спасибо",
    "uk": "і в не на що я він з як це але по всі вона так його за був від о у ж ти із ми ви б то для було мене ще"
    " тільки коли або бути ні якщо немає мені дуже вони цей може вже є їх щоб який які при також та до й під про"
    " через тому де можу можна дякую",
    "bg": "и в не на да се е с от за по това като са че ще си той тя те но най или един една едно които която който"
    " ли бе при след вече още има го я му им аз ти ние вие са беше може много само към както също между през съм"
    " как къде мога",
    "ar": "في من على إلى أن هذا هذه التي الذي عن مع كان ما لا هو هي كل كانت بعد أو لم قد ذلك بين لكن ثم حيث عند يكون"
    " هناك إن إذا و أنا نحن أنت هم كما يمكن يجب حتى غير أي كيف لماذا فقط عليه",
    "fa": "و در به از که این را با است برای آن یک خود تا بر هم نیز شما من ما می شود بود های او باید کرد شده دارد"
    " هستند هر اما یا اگر چه کند کنید است. نیست بسیار دیگر همه ها پس سلام",
    "ur": "کے کی میں ہے اور سے کا کو اس پر نے یہ ہیں کہ نہیں تو بھی ہو ایک کر تھا وہ کیا جو اپنے لیے گا تک ان آپ ہم"
    " مجھے تھی گی گیا ہوئے ہوں کوئی ساتھ بہت اگر لئے والے",
    "hi": "के की है में और से का को यह हैं पर ने एक नहीं कि भी हो था कर इस तो या लिए वह जो अपने आप हम मैं करने किया"
    " जा रहा गया थी थे साथ बहुत जब तक क्या मुझे कुछ कोई सकते होता होती करना उनके इसके",
    "mr": "आहे आणि च्या मध्ये हे ते हा ही या आहेत करण्यासाठी नाही तो ती होते होता होती मी तू आम्ही तुम्ही आपण साठी"
    " करू शकता आपल्या एक पण किंवा तर जर काय कसे खूप म्हणून असे असते त्यांच्या त्याच्या केले करा माझ्या तुमच्या सर्व ला",
    "ne": "छ र को मा हो छन् यो त्यो पनि लागि गर्न गर्ने हुन्छ भने थियो छैन तपाईं म हामी उनी तर वा एक धेरै गरेको"
    " भएको सँग बाट ले लाई का की गर्नु हुन् मेरो हाम्रो तपाईंको कि जुन यस त्यस नै गर्छ सक्छ नमस्ते छु भयो",
}
COMMON_WORDS: dict[str, frozenset[str]] = {
    # One plain letter is no evidence: it numbers a list or names a variable.
    language: frozenset(word for word in words.split() if len(word) > 1 or not word.isascii())
    for language, words in _WORDS.items()
}

OWN_LETTERS: dict[str, str] = {
    "es": "ñ",
    "pt": "ãõ",
    "fr": "œ",
    "de": "ß",
    "pl": "łąęśźżń",
    "vi": "đơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỷỹỵ",
    "sv": "å",
    "tr": "ışğ",
    "ru": "ыэё",
    "uk": "їєґі",
    "bg": "ъ",
    "ar": "ةىأإكي",
    "fa": "",
    "ur": "ٹڈڑےںھہ",
    "mr": "ळ",
}
"""Letters that none of the other languages above has in its native words."""
